"""BM25 by the package bm25s (extra `search`), with English stems and stop words, in files beside the SQLite index."""

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

from tools_server.retrieval.passages import Found
from tools_server.retrieval.sqlite_index import SearchIndex

MISSING = "bm25s needs the packages of the extra `search` ({}); install it: pip install 'jorch[search]'"


def folder_of(index: Path) -> Path:
    """Where the files of `index` lie."""
    return index.with_name(f"{index.name}.bm25s")


def tokenize(texts: list[str]) -> list[list[str]]:
    """Stems of each text. Raises ValueError where the packages are missing."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ValueError(MISSING.format(error)) from None
    found: Any = bm25s.tokenize(
        texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
    )
    return found


def build(connection: sqlite3.Connection, folder: Path) -> None:
    """Index every passage, title included, in the order of rowids, which are 1, 2, 3, ..."""
    rows = connection.execute("SELECT title, text FROM passages ORDER BY rowid").fetchall()
    tokens = tokenize([f"{title} {text}" for title, text in rows])
    import bm25s

    engine = bm25s.BM25(method="lucene")
    engine.index(tokens, show_progress=False)
    engine.save(folder)


class Bm25Retriever:
    """The index is mapped into memory, not read. Queries run in a thread."""

    def __init__(self, index: Path) -> None:
        self._index_path = index

    async def start(self) -> None:
        index, folder = SearchIndex(self._index_path), folder_of(self._index_path)
        if not folder.is_dir():
            raise ValueError(f"no bm25s index at {folder}; `python -m tools_server index --bm25s` writes one")
        tokenize(["a missing package shows now"])
        import bm25s

        self._engine = bm25s.BM25.load(folder, mmap=True)
        if (found := self._engine.scores["num_docs"]) != index.num_passages:
            raise ValueError(
                f"{folder} has {found} passages, {self._index_path} {index.num_passages}: build both again"
            )
        self._num_passages = index.num_passages
        self._connection = index.connect()
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        self._connection.close()

    async def retrieve(self, query: str, num_results: int) -> Found:
        began_s = time.monotonic()
        async with self._lock:
            started_s = time.monotonic()
            passages = await asyncio.to_thread(self._search, query, num_results)
            return Found(passages, time.monotonic() - started_s, started_s - began_s)

    def _search(self, query: str, num_results: int) -> list[Any]:
        """Passages without any word of the query have a score of 0 and are no results."""
        (words,) = tokenize([query])
        known = [word for word in words if word in self._engine.vocab_dict]
        if not known:
            return []
        best = min(num_results, self._num_passages)
        numbers, scores = self._engine.retrieve([known], k=best, show_progress=False, backend_selection="numpy")
        found = [(int(n) + 1, float(s)) for n, s in zip(numbers[0], scores[0], strict=True) if s > 0]
        return SearchIndex.passages(self._connection, [n for n, _ in found], [s for _, s in found])

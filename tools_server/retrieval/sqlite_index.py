"""The default engine: BM25 in an SQLite FTS5 index on disk, read only, built by `index.py`.

The same file may hold vectors of its passages (`dense.py`); `bm25.py` keeps its own files beside it.
"""

import asyncio
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools_server.retrieval.passages import Found, Passage, RetrievalFailure

THREADS = 4
MAX_WORDS = 64
"""Of a query; later ones are left out."""
_WORD = re.compile(r"\w+")
STOP_WORDS = frozenset(
    _WORD.findall(
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with"
    )
)
"""Lucene's for English: they tell no passage from another, and outweigh in small indexes what does."""


class SearchIndex:
    """An index on disk, read only; `search` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where there is no such index."""
        self.path = path
        if not path.is_file():
            raise ValueError(f"no search index at {path}; `python -m tools_server index` writes one")
        try:
            connection = self.connect()
            (self.num_passages,) = connection.execute("SELECT count(*) FROM passages").fetchone()
            connection.close()
        except sqlite3.Error as error:
            raise ValueError(f"{path} is no search index ({error})") from None

    def connect(self) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        return sqlite3.connect(uri, uri=True, check_same_thread=False)

    @staticmethod
    def search(connection: sqlite3.Connection, query: str, num_results: int) -> list[Passage]:
        """The best passages that hold at least one word of `query`, best first; ties in the order of indexing.

        Stop words count only in a query that has no others.
        """
        words = _WORD.findall(query)
        words = ([word for word in words if word.lower() not in STOP_WORDS] or words)[:MAX_WORDS]
        if not words:
            return []
        match = " OR ".join(f'"{word}"' for word in words)  # quoted: no word is an operator
        rows = connection.execute(
            "SELECT document_id, title, text, -bm25(passages, 0.0, 2.0, 1.0) AS score FROM passages "
            "WHERE passages MATCH ? ORDER BY score DESC, rowid LIMIT ?",
            (match, num_results),
        )
        return [Passage(*row) for row in rows]

    @staticmethod
    def passages(connection: sqlite3.Connection, rowids: list[int], scores: list[float]) -> list[Passage]:
        """Passages by their rowid, in the order given."""
        select = "SELECT document_id, title, text FROM passages WHERE rowid = ?"
        rows = (connection.execute(select, (rowid,)).fetchone() for rowid in rowids)
        return [Passage(*row, score=score) for row, score in zip(rows, scores, strict=True)]


class LexicalRetriever:
    """Queries run in threads of its own; one that takes longer than `timeout_s` is interrupted."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s

    async def start(self) -> None:
        self._index = SearchIndex(self._path)
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="search")
        self._idle = [self._index.connect() for _ in range(THREADS)]
        self._free = asyncio.Semaphore(THREADS)

    async def close(self) -> None:
        self._executor.shutdown(wait=True)
        for connection in self._idle:
            connection.close()

    async def retrieve(self, query: str, num_results: int) -> Found:
        began_s = time.monotonic()
        async with self._free:
            started_s = time.monotonic()
            connection = self._idle.pop()
            alarm = asyncio.get_running_loop().call_later(self._timeout_s, connection.interrupt)
            work = asyncio.get_running_loop().run_in_executor(
                self._executor, self._index.search, connection, query, num_results
            )
            try:
                await asyncio.wait([work])
                passages = work.result()
            except sqlite3.OperationalError as error:
                raise RetrievalFailure(f"the index does not answer: {error}") from None
            finally:
                if not work.done():  # cancelled: the connection is free when its query has ended
                    connection.interrupt()
                    await asyncio.wait([work])
                alarm.cancel()
                self._idle.append(connection)
            return Found(passages, time.monotonic() - started_s, started_s - began_s)

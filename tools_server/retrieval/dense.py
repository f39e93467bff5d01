"""Dense retrieval: vectors of passages by any OpenAI-compatible `/embeddings` endpoint, compared exactly.

Vectors lie in the SQLite index, one row a passage, normalised, so that a dot product is a cosine. All of them are read
at the start (4 bytes a number) and compared with every query: exact, and quick enough for some hundred thousand.
"""

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools_server.config import EmbeddingsConfig
from tools_server.endpoint import Endpoint, EndpointFailure, EndpointLimits, RequestRefused
from tools_server.retrieval.passages import Found, Passage, RetrievalFailure
from tools_server.retrieval.sqlite_index import SearchIndex

BATCH = 64
"""Texts of one request."""


class Embedder:
    """Texts -> unit vectors float32[n, E], E the model's width. Use between `start` and `close`."""

    def __init__(self, config: EmbeddingsConfig) -> None:
        limits = EndpointLimits(timeout_s=config.timeout_s, retries=config.retries, max_answer_bytes=64 * 1024**2)
        self._config = config
        self._endpoint = Endpoint(config.url, limits, config.key_variable)

    async def start(self) -> None:
        await self._endpoint.start()

    async def close(self) -> None:
        await self._endpoint.close()

    async def embed(self, texts: list[str]) -> tuple[np.ndarray, float, float]:
        """Vectors, and the seconds of work and of waiting. Raises RetrievalFailure."""
        try:
            exchange = await self._endpoint.post("/embeddings", {"model": self._config.model, "input": texts})
            vectors = read_embeddings(exchange.payload, len(texts))
        except (EndpointFailure, RequestRefused, ValueError) as error:
            raise RetrievalFailure(f"embeddings: {self._config.url}: {error}") from None
        return vectors, exchange.work_s, exchange.wait_s


def read_embeddings(payload: dict[str, Any], count: int) -> np.ndarray:
    """Unit vectors float32[count, E] of an embeddings answer. Raises ValueError where it is none."""
    try:
        by_index = {int(item["index"]): item["embedding"] for item in payload["data"]}
        vectors = np.asarray([by_index[i] for i in range(count)], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no list of {count} embeddings ({type(error).__name__}: {error})") from None
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True) if vectors.ndim == 2 else np.zeros(1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("embeddings that are no finite vectors other than 0")
    return vectors / lengths


async def build(connection: sqlite3.Connection, config: EmbeddingsConfig) -> None:
    """Store the vectors of all passages, title included. Raises ValueError where the endpoint fails."""
    connection.execute("CREATE TABLE vectors (passage INTEGER PRIMARY KEY, vector BLOB)")
    connection.execute("CREATE TABLE embedding_model (name TEXT)")
    connection.execute("INSERT INTO embedding_model VALUES (?)", (config.model,))
    rows = connection.execute("SELECT rowid, title, text FROM passages ORDER BY rowid").fetchall()
    embedder = Embedder(config)
    await embedder.start()
    try:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            vectors, _, _ = await embedder.embed([f"{config.passage_prefix}{title}\n{text}" for _, title, text in part])
            stored = [(rowid, vector.tobytes()) for (rowid, _, _), vector in zip(part, vectors, strict=True)]
            connection.executemany("INSERT INTO vectors VALUES (?, ?)", stored)
    except RetrievalFailure as failure:
        raise ValueError(str(failure)) from None
    finally:
        await embedder.close()


class DenseRetriever:
    """The query is embedded by the endpoint, then compared with every passage in a thread."""

    def __init__(self, index: Path, config: EmbeddingsConfig) -> None:
        self._index_path = index
        self._config = config

    async def start(self) -> None:
        index = SearchIndex(self._index_path)
        self._connection = index.connect()
        try:
            ((model,),) = self._connection.execute("SELECT name FROM embedding_model").fetchall()
            rows = self._connection.execute("SELECT passage, vector FROM vectors ORDER BY passage").fetchall()
        except sqlite3.Error:
            line = f"{self._index_path} holds no vectors; `python -m tools_server index --embeddings-url` adds them"
            raise ValueError(line) from None
        if model != self._config.model:
            raise ValueError(
                f"{self._index_path} holds vectors of {model!r}, not of {self._config.model!r}: build again"
            )
        self._rowids = [rowid for rowid, _ in rows]
        self._vectors_PE = np.stack([np.frombuffer(vector, np.float32) for _, vector in rows])
        self._lock = asyncio.Lock()
        self._embedder = Embedder(self._config)
        await self._embedder.start()

    async def close(self) -> None:
        await self._embedder.close()
        self._connection.close()

    async def retrieve(self, query: str, num_results: int) -> Found:
        vectors_1E, work_s, wait_s = await self._embedder.embed([f"{self._config.query_prefix}{query}"])
        if vectors_1E.shape[1] != self._vectors_PE.shape[1]:
            width = self._vectors_PE.shape[1]
            raise RetrievalFailure(f"embeddings: {vectors_1E.shape[1]} numbers, the index has {width}: build it again")
        began_s = time.monotonic()
        async with self._lock:  # one connection
            passages = await asyncio.to_thread(self._search, vectors_1E[0], num_results)
        return Found(passages, work_s + time.monotonic() - began_s, wait_s)

    def _search(self, query_E: np.ndarray, num_results: int) -> list[Passage]:
        scores_P = self._vectors_PE @ query_E
        best = np.argsort(-scores_P, kind="stable")[:num_results]
        return SearchIndex.passages(self._connection, [self._rowids[i] for i in best], scores_P[best].tolist())

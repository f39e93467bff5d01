"""What every retrieval engine has in common: passages, the protocol, and the fusion of several rankings."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

RANK_CONSTANT = 60
"""Of reciprocal rank fusion, as its authors chose it (Cormack, Clarke, Büttcher 2009)."""


class Passage(NamedTuple):
    """One result. A higher score is a better match; scores of different engines do not compare."""

    document_id: str
    title: str
    text: str
    score: float


class Found(NamedTuple):
    """The best passages, best first, and the seconds of the engine's own work and of waiting for it."""

    passages: list[Passage]
    work_s: float
    wait_s: float


class RetrievalFailure(RuntimeError):
    """The engine, not the query, failed."""


class Retriever(Protocol):
    """An engine. Use between `start` and `close`."""

    async def start(self) -> None:
        """Raises ValueError, one line, where something that it needs is missing."""
        ...

    async def close(self) -> None: ...

    async def retrieve(self, query: str, num_results: int) -> Found:
        """Raises RetrievalFailure."""
        ...


def fuse(rankings: Sequence[Sequence[Passage]], num_results: int) -> list[Passage]:
    """Reciprocal rank fusion: a passage's score is the sum of 1 / (60 + rank) over the rankings that have it.

    Ties go by the first ranking that has the passage, then by its rank there.
    """
    scores: dict[tuple[str, str], float] = {}
    passages: dict[tuple[str, str], Passage] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            key = (passage.document_id, passage.text)
            scores[key] = scores.get(key, 0.0) + 1.0 / (RANK_CONSTANT + rank)
            passages.setdefault(key, passage)
    best = sorted(scores, key=lambda key: -scores[key])[:num_results]  # stable
    return [passages[key]._replace(score=scores[key]) for key in best]


class FusedRetriever:
    """Several engines asked side by side. One that fails fails the query: no ranking changes with the weather."""

    def __init__(self, engines: Sequence[Retriever], depth: int) -> None:
        """`depth`: passages taken of each engine before they are fused."""
        self._engines = engines
        self._depth = depth
        self._started: list[Retriever] = []

    async def start(self) -> None:
        try:
            for engine in self._engines:
                await engine.start()
                self._started.append(engine)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._started))
        self._started.clear()

    async def retrieve(self, query: str, num_results: int) -> Found:
        depth = max(self._depth, num_results)
        answers = await asyncio.gather(*(engine.retrieve(query, depth) for engine in self._engines))
        passages = fuse([found.passages for found in answers], num_results)
        return Found(passages, max(found.work_s for found in answers), max(found.wait_s for found in answers))

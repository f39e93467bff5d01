"""The tool *search*: BM25 in an SQLite FTS5 index; and *web_search*, a service with Tavily's interface."""

import asyncio
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tools_server.config import SearchConfig, WebSearchConfig
from tools_server.endpoint import Endpoint, EndpointFailure, EndpointLimits, RequestRefused
from tools_server.tool import CallContext, Price, ToolOutput, ToolSpec, Usage, object_schema

DESCRIPTION = "Finds passages in a collection of documents by the words of a query and returns the best ones."
THREADS = 4
MAX_WORDS = 64
"""Of a query; later ones are left out."""
_WORD = re.compile(r"\w+")


class Passage(NamedTuple):
    """One result. A higher score is a better match."""

    document_id: str
    title: str
    text: str
    score: float


class SearchIndex:
    """An index on disk, read only; `search` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where there is no such index."""
        self._path = path
        if not path.is_file():
            raise ValueError(f"no search index at {path}; `python -m tools_server index` writes one")
        try:
            connection = self.connect()
            (self.num_passages,) = connection.execute("SELECT count(*) FROM passages").fetchone()
            connection.close()
        except sqlite3.Error as error:
            raise ValueError(f"{path} is no search index ({error})") from None

    def connect(self) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
        return sqlite3.connect(uri, uri=True, check_same_thread=False)

    @staticmethod
    def search(connection: sqlite3.Connection, query: str, num_results: int) -> list[Passage]:
        """The best passages that hold at least one word of `query`, best first; ties in the order of indexing."""
        words = _WORD.findall(query)[:MAX_WORDS]
        if not words:
            return []
        match = " OR ".join(f'"{word}"' for word in words)  # quoted: no word is an operator
        rows = connection.execute(
            "SELECT document_id, title, text, -bm25(passages, 0.0, 2.0, 1.0) AS score FROM passages "
            "WHERE passages MATCH ? ORDER BY score DESC, rowid LIMIT ?",
            (match, num_results),
        )
        return [Passage(*row) for row in rows]


class SearchTool:
    """Queries run in threads of the tool's own; one that takes too long is interrupted."""

    def __init__(self, name: str, config: SearchConfig) -> None:
        self.spec = search_spec(name, config)
        self._config = config

    async def start(self) -> list["SearchTool"]:
        try:
            self._index = SearchIndex(self._config.index)
        except ValueError as error:
            raise ValueError(f"tools.{self.spec.name}: {error}") from None
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="search")
        self._idle = [self._index.connect() for _ in range(THREADS)]
        self._free = asyncio.Semaphore(THREADS)
        return [self]

    async def close(self) -> None:
        self._executor.shutdown(wait=True)
        for connection in self._idle:
            connection.close()

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        began_s = time.monotonic()
        async with self._free:
            started_s = time.monotonic()
            connection = self._idle.pop()
            alarm = asyncio.get_running_loop().call_later(self.spec.timeout_s, connection.interrupt)
            work = asyncio.get_running_loop().run_in_executor(
                self._executor, self._index.search, connection, arguments["query"], self._config.num_results
            )
            try:
                await asyncio.wait([work])
                passages = work.result()
            except sqlite3.OperationalError as error:
                return ToolOutput(f"the index does not answer: {error}", "infra_error")
            finally:
                if not work.done():  # cancelled: the connection is free when its query has ended
                    connection.interrupt()
                    await asyncio.wait([work])
                alarm.cancel()
                self._idle.append(connection)
            work_s = time.monotonic() - started_s
        content = show_passages(passages, self._config.max_characters)
        return ToolOutput(content, None, Usage(seconds=work_s), work_s, started_s - began_s)


def search_spec(name: str, config: Any) -> ToolSpec:
    """The declaration that both kinds of search share."""
    query = {"type": "string", "description": "words to look for", "minLength": 1, "maxLength": 2000}
    return ToolSpec(
        name,
        config.description or DESCRIPTION,
        object_schema({"query": query}, ["query"]),
        timeout_s=config.timeout_s,
        version=config.version,
        price=Price(call_usd=config.usd_per_call),
        latency_s=config.latency_s,
    )


def show_passages(passages: list[Passage], max_characters: int) -> str:
    """What the orchestrator reads."""
    if not passages:
        return "(nothing was found)"
    return "\n\n".join(
        f"[{i}] {passage.title}\n{passage.text[:max_characters]}" for i, passage in enumerate(passages, start=1)
    )


class WebSearchTool:
    """Asks a search service; its passages look like the index's."""

    def __init__(self, name: str, config: WebSearchConfig) -> None:
        self.spec = search_spec(name, config)
        self._config = config

    async def start(self) -> list["WebSearchTool"]:
        limits = EndpointLimits(timeout_s=self._config.timeout_s, retries=self._config.retries)
        self._endpoint = Endpoint(self._config.url, limits, self._config.key_variable)
        try:
            await self._endpoint.start()
        except ValueError as error:
            raise ValueError(f"tools.{self.spec.name}: {error}") from None
        return [self]

    async def close(self) -> None:
        await self._endpoint.close()

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        request = {"query": arguments["query"], "max_results": self._config.num_results}
        try:
            exchange = await self._endpoint.post("", request)
            passages = [
                Passage(str(found["url"]), str(found["title"]), str(found["content"]), float(found.get("score") or 0.0))
                for found in exchange.payload["results"][: self._config.num_results]
            ]
        except RequestRefused as error:
            return ToolOutput(f"the service does not take this query: {error}", "tool_error")
        except EndpointFailure as failure:
            return ToolOutput(str(failure), "infra_error", wait_s=failure.wait_s)
        except (KeyError, TypeError, ValueError) as error:
            return ToolOutput(f"{self._config.url} answers in another form ({error!r})", "infra_error")
        content = show_passages(passages, self._config.max_characters)
        return ToolOutput(content, None, Usage(seconds=exchange.work_s), exchange.work_s, exchange.wait_s)

"""The tool kinds *search* and *opensearch*, passages of a collection, and *web_search*, a service like Tavily's."""

from typing import Any

from tools_server.config import OpenSearchConfig, SearchConfig, WebSearchConfig
from tools_server.endpoint import Endpoint, EndpointFailure, EndpointLimits, RequestRefused
from tools_server.retrieval.bm25 import Bm25Retriever
from tools_server.retrieval.dense import DenseRetriever
from tools_server.retrieval.passages import FusedRetriever, Passage, RetrievalFailure, Retriever
from tools_server.retrieval.sqlite_index import LexicalRetriever
from tools_server.tool import CallContext, Price, ToolOutput, ToolSpec, Usage, object_schema

DESCRIPTION = "Finds passages in a collection of documents that fit a query and returns the best ones."


def retriever_of(config: SearchConfig) -> Retriever:
    """The engine, or the two engines fused, that `config` asks for."""
    if config.lexical == "bm25s":
        lexical: Retriever = Bm25Retriever(config.index)
    else:
        lexical = LexicalRetriever(config.index, config.timeout_s)
    if config.embeddings is None:
        return lexical
    return FusedRetriever([lexical, DenseRetriever(config.index, config.embeddings)], config.fusion_depth)


class SearchTool:
    """One engine; which, the server's config says."""

    def __init__(self, name: str, config: SearchConfig | OpenSearchConfig, retriever: Retriever) -> None:
        self.spec = search_spec(name, config)
        self._config = config
        self._retriever = retriever

    async def start(self) -> list["SearchTool"]:
        try:
            await self._retriever.start()
        except ValueError as error:
            raise ValueError(f"tools.{self.spec.name}: {error}") from None
        return [self]

    async def close(self) -> None:
        await self._retriever.close()

    async def fault(self) -> str | None:
        """Why the engine cannot be used, or None: asked with the shortest query there is."""
        output = await self.call({"query": "a"}, CallContext("check", seed=0))
        return output.content if output.error else None

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        try:
            found = await self._retriever.retrieve(arguments["query"], self._config.num_results)
        except RetrievalFailure as failure:
            return ToolOutput(str(failure), "infra_error")
        content = show_passages(found.passages, self._config.max_characters)
        return ToolOutput(content, None, Usage(seconds=found.work_s), found.work_s, found.wait_s)


def search_spec(name: str, config: Any) -> ToolSpec:
    """The declaration that all kinds of search share."""
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

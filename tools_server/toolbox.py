"""The server's tools: built from its config, started and closed together, found by name."""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tools_server.arguments import Check, compile_checks
from tools_server.config import (
    ChatConfig,
    ConstantConfig,
    McpConfig,
    OpenSearchConfig,
    PythonConfig,
    RemotePythonConfig,
    SearchConfig,
    ServerConfig,
    SimulatedConfig,
    WebSearchConfig,
)
from tools_server.errors import log
from tools_server.metrics import Metrics
from tools_server.prices import load_prices, price_of
from tools_server.recording import Recorder
from tools_server.retrieval.opensearch import OpenSearchRetriever
from tools_server.sandbox.remote import RemoteRunner, Runner
from tools_server.spans import Spans
from tools_server.tool import CallContext, Tool, ToolOutput
from tools_server.tools.chat import ChatTool
from tools_server.tools.constant import ConstantTool
from tools_server.tools.mcp import McpServer
from tools_server.tools.orchestrator import OrchestratorTool
from tools_server.tools.python import PythonTool
from tools_server.tools.search import SearchTool, WebSearchTool, retriever_of
from tools_server.tools.simulated import SimulatedTool


class Source(Protocol):
    """What an entry of the config's `tools` becomes: one tool that is its own source, or a server of several."""

    async def start(self) -> Sequence[Tool]:
        """Raises ValueError, one line, where something that the tools need is missing."""
        ...

    async def close(self) -> None: ...


class Toolbox:
    """Every tool of a server, by name. Use between `start` and `close`."""

    def __init__(self, config: ServerConfig, metrics: Metrics, spans: Spans | None = None) -> None:
        """Raises ValueError where a price is not to be had or the file of recordings cannot be used."""
        self._metrics = metrics
        self._spans = spans or Spans(None)
        self.recorder = Recorder(config.recording) if config.recording is not None else None
        table = load_prices(config.prices) if config.prices is not None else None
        self._sources: list[Source] = []
        self._started: list[Source] = []
        self.tools: dict[str, Tool] = {}
        self.checks: Mapping[str, Check] = {}
        for name, entry in config.tools.items():
            match entry:
                case ConstantConfig():
                    self._sources.append(ConstantTool(name, entry))
                case SearchConfig():
                    self._sources.append(SearchTool(name, entry, retriever_of(entry)))
                case OpenSearchConfig():
                    self._sources.append(SearchTool(name, entry, OpenSearchRetriever(entry)))
                case WebSearchConfig():
                    self._sources.append(WebSearchTool(name, entry))
                case PythonConfig() | RemotePythonConfig():
                    self._sources.append(PythonTool(name, entry))
                case ChatConfig():
                    kind = OrchestratorTool if entry.tools else ChatTool
                    self._sources.append(kind(name, entry, price_of(name, entry, config, table)))
                case McpConfig():
                    self._sources.append(McpServer(name, entry))
                case SimulatedConfig():
                    profile = config.experts[entry.expert]
                    self._sources.append(SimulatedTool(name, entry, profile, config.seed, config.time_scale))

    async def start(self) -> None:
        """Raises ValueError where a tool cannot start or two have one name; what had started is closed again."""
        try:
            for source in self._sources:
                tools = await source.start()
                self._started.append(source)
                for tool in tools:
                    if tool.spec.name in self.tools:
                        raise ValueError(f"two tools are called {tool.spec.name!r}: choose other names")
                    self.tools[tool.spec.name] = tool
            self.checks = compile_checks([tool.spec.openai for tool in self.tools.values()])
            for tool in self.tools.values():
                if isinstance(tool, OrchestratorTool):
                    tool.bind(self)
        except BaseException:
            await self.close()
            raise

    async def check(self) -> list[str]:
        """One line for each entry of the config that cannot be used; all are started and closed again."""
        faults = []
        for source in self._sources:
            try:
                await source.start()
            except ValueError as error:
                faults.append(str(error))
                continue
            self._started.append(source)
            if isinstance(source, ChatTool | SearchTool | PythonTool) and (fault := await source.fault()):
                faults.append(f"tools.{source.spec.name}: {fault}")
        await self.close()
        return faults

    async def close(self) -> None:
        await asyncio.gather(*(source.close() for source in self._started))
        self._started.clear()
        if self.recorder is not None:
            self.recorder.close()

    def runners(self) -> dict[str, tuple[Runner, float]]:
        """What runs programs here, by tool, with the longest time of a program; other servers' are not passed on."""
        return {
            name: (tool.pool, tool.spec.timeout_s)
            for name, tool in self.tools.items()
            if isinstance(tool, PythonTool) and not isinstance(tool.pool, RemoteRunner)
        }

    async def call(self, name: str, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        """One call whose arguments fit the schema. A bug of a tool's is an `infra_error`, never the model's fault."""
        tool = self.tools[name]
        if self.recorder is None:
            return await self._carry_out(tool, arguments, context)
        carry_out = functools.partial(self._carry_out, tool, arguments, context)
        return await self.recorder.call(tool.spec, arguments, context, carry_out)

    async def _carry_out(self, tool: Tool, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        try:
            with self._spans.span(f"tool {tool.spec.name}", session=context.session_id) as span:
                output = await tool.call(arguments, context)
                if span is not None:
                    span.set_attributes({"error": output.error or "none", "wait_s": output.wait_s})
            self._metrics.observe_tool(tool.spec.name, output.work_s, output.wait_s)
            return output
        except Exception as error:
            log.exception("a tool failed", extra={"session": context.session_id, "tool": tool.spec.name})
            return ToolOutput(f"the tool failed: {type(error).__name__}", "infra_error")

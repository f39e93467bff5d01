"""The tool kind *mcp*: tools of an MCP server, over stdio or HTTP, through the official SDK (extra `mcp`)."""

import asyncio
import contextlib
import time
from typing import Any

from tools_server.config import McpConfig
from tools_server.tool import CallContext, Price, ToolOutput, ToolSpec, Usage

START_TIMEOUT_S = 60.0


class McpTool:
    """One tool of an MCP server."""

    def __init__(self, server: "McpServer", spec: ToolSpec) -> None:
        self.spec = spec
        self._server = server

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        return await self._server.call(self.spec, arguments)


class McpServer:
    """A connection to an MCP server.

    A task of its own holds it: the SDK's scopes must be left by the task that entered them.
    """

    def __init__(self, name: str, config: McpConfig) -> None:
        self._name = name
        self._config = config
        self._stop = asyncio.Event()

    async def start(self) -> list[McpTool]:
        """Raises ValueError where the SDK is missing or the server does not answer."""
        ready: asyncio.Future[list[McpTool]] = asyncio.get_running_loop().create_future()
        self._connection = asyncio.create_task(self._hold(ready))
        await asyncio.wait([ready, self._connection], timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return ready.result()
        self._connection.cancel()
        (outcome,) = await asyncio.gather(self._connection, return_exceptions=True)
        reason = f"no answer within {START_TIMEOUT_S:g} s" if isinstance(outcome, asyncio.CancelledError) else outcome
        raise ValueError(f"tools.{self._name}: the MCP server cannot be used: {_innermost(reason)}")

    async def close(self) -> None:
        self._stop.set()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._connection

    async def call(self, spec: ToolSpec, arguments: dict[str, Any]) -> ToolOutput:
        """MCP's own split holds: `is_error` is the tool's failure, any other is the server's."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(spec.timeout_s):
                result = await self._client.call_tool(spec.name, arguments)
        except TimeoutError:
            return ToolOutput(f"no answer within {spec.timeout_s:g} s", "infra_error")
        except Exception as error:  # whatever the SDK, its transport or the server's protocol raise
            return ToolOutput(f"the MCP server failed: {_innermost(error)}", "infra_error")
        work_s = time.monotonic() - began_s
        content = "\n".join(part.text if part.type == "text" else f"({part.type})" for part in result.content)
        return ToolOutput(content, "tool_error" if result.is_error else None, Usage(seconds=work_s), work_s)

    async def _hold(self, ready: asyncio.Future[list[McpTool]]) -> None:
        try:
            from mcp import Client, StdioServerParameters
        except ImportError as error:
            raise ValueError(f"{error}; install the extra mcp") from None
        if self._config.command is not None:
            command, *arguments = self._config.command
            target: Any = StdioServerParameters(command=command, args=arguments)
        else:
            target = self._config.url
        async with Client(target) as self._client:
            listed = (await self._client.list_tools()).tools
            ready.set_result([McpTool(self, self._spec(tool)) for tool in self._wanted(listed)])
            await self._stop.wait()

    def _wanted(self, listed: list[Any]) -> list[Any]:
        if self._config.tools is None:
            return listed
        by_name = {tool.name: tool for tool in listed}
        missing = [name for name in self._config.tools if name not in by_name]
        if missing:
            raise ValueError(f"it has no tool {missing[0]!r}; it has {', '.join(by_name)}")
        return [by_name[name] for name in self._config.tools]

    def _spec(self, tool: Any) -> ToolSpec:
        config, hints = self._config, tool.annotations
        return ToolSpec(
            tool.name,
            tool.description or tool.name,
            tool.input_schema,
            side_effect="read" if hints is not None and hints.read_only_hint else "write",
            timeout_s=config.timeout_s,
            version=config.version,
            price=Price(call_usd=config.usd_per_call),
            latency_s=config.latency_s,
        )


def _innermost(error: Any) -> str:
    """The first real cause in a group of exceptions, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())[:300] or type(error).__name__

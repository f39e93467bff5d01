"""`/mcp`: the configured tools for any MCP client (streamable HTTP, without sessions), through the official SDK.

The SDK speaks ASGI and this server aiohttp, so each request is handed over whole: without sessions every answer is
one JSON object, and nothing is streamed. Calls made here belong to no session and are billed to nobody.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tools_server.authorisation import allow_server_only
from tools_server.tool import CallContext, ToolSpec
from tools_server.toolbox import Toolbox

CONTEXT = CallContext("mcp", seed=0)


class McpFacade:
    """The ASGI application of the SDK's server, and the handler that feeds it."""

    def __init__(self, toolbox: Toolbox) -> None:
        """Raises ImportError where the extra `mcp` is not installed."""
        from mcp.server.lowlevel import Server
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

        logging.getLogger("mcp").setLevel(logging.WARNING)  # it reports every request
        self._toolbox = toolbox
        server: Any = Server("jorch-tools", on_list_tools=self._list_tools, on_call_tool=self._call_tool)
        self._manager = StreamableHTTPSessionManager(server, json_response=True, stateless=True)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The SDK's scope is entered and left by one task, whichever tasks start and stop the server."""
        ready, stop = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with self._manager.run():
                ready.set()
                await stop.wait()

        holder = asyncio.create_task(hold())
        await ready.wait()
        try:
            yield
        finally:
            stop.set()
            await holder

    async def handle(self, request: web.Request) -> web.Response:
        """One POST. Its calls belong to no session and to no bill."""
        allow_server_only(request)
        body = await request.read()
        status, headers, content = 500, [], bytearray()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message.get("headers", [])
            else:
                content.extend(message.get("body", b""))

        await self._manager.handle_request(_scope(request), receive, send)
        names = {name.decode().lower(): value.decode() for name, value in headers}
        names.pop("content-length", None)
        return web.Response(status=status, headers=names, body=bytes(content))

    async def _list_tools(self, context: Any, parameters: Any) -> Any:
        from mcp import types

        return types.ListToolsResult(tools=[_to_mcp(tool.spec) for tool in self._toolbox.tools.values()])

    async def _call_tool(self, context: Any, parameters: Any) -> Any:
        from mcp import types

        name, arguments = parameters.name, parameters.arguments or {}
        if name not in self._toolbox.tools:
            content, failed = f"unknown tool; allowed: {', '.join(self._toolbox.tools)}", True
        elif mistake := self._toolbox.checks[name](arguments):
            content, failed = mistake, True
        else:
            output = await self._toolbox.call(name, arguments, CONTEXT)
            content, failed = output.content, output.error is not None
        return types.CallToolResult(content=[types.TextContent(type="text", text=content)], is_error=failed)


def _to_mcp(spec: ToolSpec) -> Any:
    """The MCP tool of a declaration."""
    from mcp import types

    hints = types.ToolAnnotations(
        read_only_hint=spec.side_effect != "write", idempotent_hint=spec.side_effect == "pure"
    )
    return types.Tool(name=spec.name, description=spec.description, input_schema=spec.parameters, annotations=hints)


def _scope(request: web.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.raw_path.encode(),
        "query_string": request.query_string.encode(),
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
        "client": None,
        "server": None,
        "state": {},
    }

"""Spans as a collector gets them: over HTTP, in OTLP's own encoding."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from tools_server.app import make_app
from tools_server.config import ServerConfig

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_trainers_trace_goes_on_in_the_server(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)
    spans = []

    async def collect(request):
        payload = ExportTraceServiceRequest.FromString(await request.read())
        spans.extend(s for r in payload.resource_spans for scope in r.scope_spans for s in scope.spans)
        return web.Response()

    async def start(app):
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def main():
        collector_app = web.Application()
        collector_app.router.add_post("/v1/traces", collect)
        collector, url = await start(collector_app)
        config = {"tools": {"say": {"kind": "constant", "answer": "yes"}}, "spans_url": f"{url}/v1/traces"}
        server, address = await start(make_app(ServerConfig.model_validate(config)))
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        async with aiohttp.ClientSession(address) as http:
            session = {"session_id": "a", "environment": "tools", "setup": {}}
            async with http.post("/v1/sessions", json={"sessions": [session]}) as response:
                assert response.status == 200
            call = {"call_id": "0", "name": "say", "arguments": {}}
            async with http.post("/v1/sessions/a/call", json=call, headers=headers) as response:
                assert (await response.json())["content"] == "yes"
            async with http.get("/healthz") as response:
                assert response.status == 200
        await server.cleanup()
        await collector.cleanup()

    asyncio.run(main())
    found = {span.name: span for span in spans}
    assert set(found) == {"POST /v1/sessions", "POST /v1/sessions/{id}/call", "tool say"}
    request, tool = found["POST /v1/sessions/{id}/call"], found["tool say"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert (tool.trace_id.hex(), tool.parent_span_id) == (TRACE, request.span_id)
    assert {a.key: a.value.string_value for a in tool.attributes if a.key != "wait_s"} == {
        "session": "a",
        "error": "none",
    }
    assert found["POST /v1/sessions"].trace_id.hex() != TRACE

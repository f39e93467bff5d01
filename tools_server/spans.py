"""OpenTelemetry spans, where the config names a collector: one a request, one a tool's work.

A request's span continues the trace of its `traceparent` header, so that a trainer sees its rollout's calls below its
own spans. What a session is called is an attribute of a span, and never a label of a metric.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tools_server.authorisation import OPEN_PATHS

NO_SPAN = contextlib.nullcontext()


class Spans:
    """Sends spans to a collector, in batches and in a thread of its own; without a url it does nothing."""

    def __init__(self, url: str | None) -> None:
        """Raises ValueError where the extra otel is not installed."""
        self._provider: Any = None
        if url is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ValueError(f"spans_url needs a package that is missing ({error}): install the extra otel") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jorch-tools-server"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("tools_server")
        self._propagator = TraceContextTextMapPropagator()

    async def close(self) -> None:
        """Send what is left; off the loop, because a collector may be slow."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)

    def span(
        self, name: str, parent: Any = None, **attributes: str | int | float
    ) -> contextlib.AbstractContextManager[Any]:
        """Around a block, below the current span; gives the span, or None where none are sent."""
        if self._provider is None:
            return NO_SPAN
        return self._tracer.start_as_current_span(name, context=parent, attributes=attributes)

    @property
    def middlewares(self) -> list[Any]:
        return [] if self._provider is None else [self._trace_request]

    @web.middleware
    async def _trace_request(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        parent = self._propagator.extract(request.headers)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        with self.span(f"{request.method} {route}", parent, **{"http.request.method": request.method}) as span:
            response = await handler(request)
            span.set_attribute("http.response.status_code", response.status)
            return response

"""What the server counts, for Prometheus (`GET /metrics`). Labels are few and closed: no session or task is one."""

import asyncio
import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tools_server.wire import FAILURES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_INTERVAL_S = 0.25
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ToolSeconds(Collector):
    """A histogram by tool. prometheus_client's own takes a lock a bucket, which calls that do little would feel."""

    def __init__(self, name: str, about: str, registry: CollectorRegistry) -> None:
        self._name, self._about = name, about
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, tool: str, seconds: float) -> None:
        counts = self._counts.get(tool)
        if counts is None:
            counts = self._counts[tool] = [0] * (len(SECONDS) + 1)
        counts[bisect_left(SECONDS, seconds)] += 1
        self._sums[tool] = self._sums.get(tool, 0.0) + seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._about, labels=["tool"])
        bounds = [floatToGoString(bound) for bound in (*SECONDS, math.inf)]
        for tool, counts in self._counts.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric([tool], buckets, self._sums[tool])
        yield family


class Metrics:
    """Every metric of one server."""

    def __init__(self, num_sessions: Callable[[], int], num_calls: Callable[[], int] = lambda: 0) -> None:
        self._registry = registry = CollectorRegistry()
        self._calls = Counter(
            "tools_calls",
            "Calls, and how they went (wire.FAILURES)",
            ["environment", "kind"],
            registry=registry,
        )
        self._finished = Counter(
            "tools_sessions_finished",
            "Finished sessions",
            ["environment", "error"],
            registry=registry,
        )
        self._work_s = ToolSeconds("tools_work_seconds", "A tool's own work", registry)
        self._wait_s = ToolSeconds("tools_wait_seconds", "Queue, back-off and failed attempts", registry)
        self._lag_s = Histogram(
            "tools_event_loop_lag_seconds", "How late the event loop is", buckets=SECONDS, registry=registry
        )
        self._judged = Counter(
            "tools_judge_verdicts",
            "Verdicts of a model as judge, by whether the rule (exact match) says the same",
            ["agrees"],
            registry=registry,
        )
        open_sessions = Gauge("tools_sessions_open", "Open sessions", registry=registry)
        open_sessions.set_function(num_sessions)
        calls = Gauge("tools_calls_under_way", "Calls that are waiting or at work", registry=registry)
        calls.set_function(num_calls)
        self._lost = Counter(
            "tools_workers_lost",
            "Worker processes that ended before their time: died, or killed because a call hung",
            ["cause"],
            registry=registry,
        )
        self._refused = Counter("tools_refused", "Requests refused with 429, by cap", ["cap"], registry=registry)
        self._children: dict[tuple[str, str | None], Counter] = {}

    def count_call(self, environment: str, error: str | None) -> None:
        child = self._children.get((environment, error))
        if child is None:  # finding a child by its labels takes longer than counting
            kind = "ok" if error is None else FAILURES[error]
            child = self._children[environment, error] = self._calls.labels(environment, kind)
        child.inc()

    def count_finished(self, environment: str, error: str | None) -> None:
        self._finished.labels(environment, error or "none").inc()

    def count_judged(self, agrees: bool) -> None:
        self._judged.labels("yes" if agrees else "no").inc()

    def count_refused(self, cap: str) -> None:
        self._refused.labels(cap).inc()

    def count_lost_worker(self, cause: str) -> None:
        """In any thread."""
        self._lost.labels(cause).inc()

    def observe_tool(self, tool: str, work_s: float, wait_s: float) -> None:
        self._work_s.observe(tool, work_s)
        self._wait_s.observe(tool, wait_s)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    async def watch_lag(self) -> None:
        """Until cancelled: how much later than asked a sleep ends."""
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL_S)
            self._lag_s.observe(max(0.0, time.monotonic() - began_s - LAG_INTERVAL_S))

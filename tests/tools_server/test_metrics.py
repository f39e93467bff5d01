"""What Prometheus is told of the tools' seconds, beside prometheus_client's own histogram of the same observations."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tools_server.metrics import SECONDS, Metrics, ToolSeconds


def test_seconds_by_tool_read_as_prometheus_own_histogram():
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    seconds = ToolSeconds("tools_work_seconds", "A tool's own work", ours)
    histogram = Histogram("tools_work_seconds", "A tool's own work", ["tool"], buckets=SECONDS, registry=theirs)
    for tool, value in (("a", 0.0), ("a", 0.005), ("b", 0.0051), ("a", 299.9), ("b", 300.0), ("b", 1e6), ("a", 0.25)):
        seconds.observe(tool, value)
        histogram.labels(tool).observe(value)

    def lines(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert lines(ours) == lines(theirs)


def test_lost_workers_are_counted_by_cause():
    metrics = Metrics(lambda: 0)
    for cause in ("died", "hung", "died"):
        metrics.count_lost_worker(cause)
    rendered = metrics.render().decode()
    assert 'tools_workers_lost_total{cause="died"} 2.0' in rendered
    assert 'tools_workers_lost_total{cause="hung"} 1.0' in rendered

"""The benchmark runs and reports every figure; what the figures are, no test can say."""

import json
import shutil
import subprocess
import sys

import pytest

from tools_server.bench import TARGETS, verdict
from tools_server.load import closed_loop, open_loop, quantile


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap (Debian package bubblewrap)")
def test_every_figure_is_reported(tmp_path):
    command = [sys.executable, "-m", "tools_server", "bench", "--quick", "--json", str(tmp_path / "bench.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    figures = report["figures"]
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(figures)
    assert set(TARGETS) - set(figures) <= {name for name in TARGETS if name.startswith(("airline_", "telecom_"))}
    for name in ("null_call_cpu_us", "echo_cpu_us", "open_loop_p99_ms", "burst_rollouts_per_s", "python_calls_per_s"):
        assert figures[name] > 0
    assert figures["soak_calls"] == 2000
    assert [figures[f"soak_{what}"] for what in ("descriptors", "threads", "processes", "cgroups")] == [0] * 4
    assert report["quick"] is True


def test_a_figure_is_shown_beside_its_target():
    shown = [verdict(*figure) for figure in (("python_p99_ms", 150), ("python_p99_ms", 151), ("echo_cpu_us", 9))]
    assert shown == ["   at most 150: met", "   at most 150: missed", ""]
    shown = [verdict("python_calls_per_s", value) for value in (24.9, 25)]
    assert shown == ["   at least 25: missed", "   at least 25: met"]


def test_an_open_loop_counts_the_wait_for_the_start():
    """Calls that block for 0.1 s and are due every 0.01 s: the last one starts 0.1 s - 0.01 s late for each before it."""
    import asyncio
    import time

    async def block(number):
        time.sleep(0.1)

    async def main():
        return await open_loop(block, 5, per_second=100.0), await closed_loop(block, 5, at_once=5)

    opened, closed = asyncio.run(main())
    assert max(opened) >= 0.1 * 5 - 0.01 * 4 - 0.02
    assert quantile(closed, 0.5) < 0.4


def test_quantiles():
    values = list(range(100))
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.99)) == (50, 99, 7.0)

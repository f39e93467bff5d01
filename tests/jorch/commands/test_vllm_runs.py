"""`jorch rl` through real vLLM servers: adapters pushed in place, and servers that die beside an asynchronous run."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jorch.export import pretrained
from jorch.export.adapter import CONFIG, WEIGHTS
from jorch.run_folder import read_jsonl
from jorch.sections import MeshConfig, SamplerConfig, VllmConfig
from jorch.serving.samplers import Weights
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, vllm_server
from jorch.sharding import make_mesh

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as vLLM on a CPU takes it."""
    start = pretrained.load("base", make_mesh(MeshConfig()))
    config = SamplerConfig(max_context_tokens=112, vllm=VllmConfig())
    return Weights(start, tmp_path_factory.mktemp("weights"), config).write_base(start.params)


@contextmanager
def server(base: Path, log: Path, port: int = 0) -> Iterator[str]:
    with vllm_server(ServeOptions(base, max_context_tokens=112, rl=True, port=port), log) as url:
        yield url


def kill(url: str) -> None:
    """All of a server but its guard."""
    port = url.rpartition(":")[2]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if port.encode() in words and not any(word.endswith(b"guard.py") for word in words):
            os.kill(int(process.name), signal.SIGKILL)


def test_a_run_that_trains_an_adapter_pushes_it_every_step(jorch: Any) -> None:
    result = jorch.run("rl", "rl.yaml", "lora={rank: 4}", "sampler.vllm={}", "steps=3")
    assert result.returncode == 0, result.stderr
    rows = read_jsonl(jorch.world / "rl" / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        # Nothing but float32 in two implementations lies between trainer and sampler.
        assert max(abs(row["policy/log_ratio_p01_nats"]), abs(row["policy/log_ratio_p99_nats"])) < 1e-3
    weights = jorch.world / "rl" / "weights"
    assert {path.name for path in weights.iterdir()} == {"base", "v3"}
    assert {CONFIG, WEIGHTS} <= {path.name for path in (weights / "v3").iterdir()}
    assert jorch.stray() == []


def test_of_two_servers_one_dies_beside_an_asynchronous_run(base: Path, jorch: Any, tmp_path: Path) -> None:
    """The steps go on with the other one, and every token has a version that its step may train on."""
    folder = jorch.world / "rl"
    with server(base, tmp_path / "a.log") as first, server(base, tmp_path / "b.log") as second:
        child = jorch.start(
            "rl", "rl.yaml", "max_policy_lag=1", "steps=8", f"sampler.vllm={{urls: [{first}, {second}]}}"
        )
        jorch.wait(lambda: len(read_jsonl(folder / "metrics.jsonl")) >= 2, "two steps")
        kill(second)
        stdout, stderr = child.communicate(timeout=300)
    assert child.returncode == 0, stderr
    assert f"vLLM at {second} is out of rotation" in stdout
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert all(row["rollout/infra_error"] == 0 for row in rows)
    # The median token's weights are those it is trained with, but for one update.
    assert all(abs(row["policy/log_ratio_p50_nats"]) < 0.05 for row in rows)
    for record in read_jsonl(folder / "trajectories.jsonl"):
        for turn in record["turns"]:
            assert all(record["step"] - 1 <= version <= record["step"] for version in turn["policy_versions"])


def test_a_run_whose_only_server_dies_is_resumed(base: Path, jorch: Any, tmp_path: Path) -> None:
    folder = jorch.world / "rl"
    with server(base, tmp_path / "a.log") as url:
        run = ("rl", "rl.yaml", "max_policy_lag=1", "steps=6", f"sampler.vllm={{urls: [{url}], request_timeout_s: 20}}")
        child = jorch.start(*run)
        jorch.wait(lambda: len(read_jsonl(folder / "metrics.jsonl")) >= 2, "two steps")
        kill(url)
        _, stderr = child.communicate(timeout=300)
    assert child.returncode == 1, stderr
    assert stderr.startswith("jorch: error: no vLLM server ")
    assert url in stderr
    assert stderr.endswith("--resume\n")
    assert stderr.count("\n") == 1
    with server(base, tmp_path / "a.log", int(url.rpartition(":")[2])):
        result = jorch.run(*run, "--resume")
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(6))

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
def server(base: Path, log: Path, lora_rank: int | None, port: int = 0) -> Iterator[str]:
    options = ServeOptions(base, max_context_tokens=112, rl=True, port=port, lora_rank=lora_rank)
    with vllm_server(options, log) as url:
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


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["whole", "adapter"])
def test_servers_die_beside_an_asynchronous_run(lora_rank: int | None, base: Path, jorch: Any, tmp_path: Path) -> None:
    """Steps go on with one of two, and are resumed once the other one, which died later, is back."""
    folder = jorch.world / "rl"
    with server(base, tmp_path / "a.log", lora_rank) as first, server(base, tmp_path / "b.log", lora_rank) as second:
        # Weights that stay as they are: whatever version drew a token, its log-probability is the trainer's.
        run = ("rl", "rl.yaml", "max_policy_lag=1", "steps=12", "optimizer.learning_rate=1e-12")
        run += (f"lora={'null' if lora_rank is None else {'rank': lora_rank}}",)
        run += (f"sampler.vllm={{urls: [{first}, {second}], request_timeout_s: 20}}",)
        child = jorch.start(*run)
        jorch.wait(lambda: num_steps(folder) >= 2, "two steps")
        kill(second)
        jorch.wait(lambda: num_steps(folder) >= 6 or child.poll() is not None, "steps with one server")
        kill(first)
        stdout, stderr = child.communicate(timeout=300)
    assert f"vLLM at {second} is out of rotation" in stdout
    assert child.returncode == 1, stderr
    assert stderr.startswith("jorch: error: no vLLM server ")
    assert first in stderr
    assert stderr.endswith("--resume\n")
    assert stderr.count("\n") == 1
    assert num_steps(folder) >= 6
    with server(base, tmp_path / "a.log", lora_rank, int(first.rpartition(":")[2])):
        result = jorch.run(*run, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"vLLM at {second} is out of rotation" in result.stdout
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(12))
    for row in rows:
        assert row["rollout/infra_error"] == 0
        assert max(abs(row["policy/log_ratio_p01_nats"]), abs(row["policy/log_ratio_p99_nats"])) < 1e-3
        assert row["policy/sampler_gap_nats"] < 1e-4
    for record in read_jsonl(folder / "trajectories.jsonl"):
        for turn in record["turns"]:
            assert all(record["step"] - 1 <= version <= record["step"] for version in turn["policy_versions"])


def num_steps(folder: Path) -> int:
    return len(read_jsonl(folder / "metrics.jsonl"))

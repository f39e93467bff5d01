"""What the tests of whole commands share: a small world on disk, and `jorch` run in it as a user would.

Runs in a process of their own share a compile cache, so that all but the first take seconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from jorch import cli
from jorch.run_folder import read_jsonl
from jorch.sections import MiniatureConfig
from jorch.synth import miniature

RL = """
init_from: base
tasks: tasks.jsonl
tools_server: {config: server.yaml}
steps: 4
tasks_per_step: 4
group_size: 4
sampler: {max_rows: 16, max_context_tokens: 112, prefill_chunk_tokens: 64}
rollout:
  max_turns: 5
  max_tokens_per_turn: 4
  max_prompt_tokens: 64
  max_malformed_calls: 1
  call_retries: 1
batch: {row_tokens: 128, micro_rows: 8}
optimizer: {learning_rate: 1e-3}
checkpoint: {every_steps: 1, keep: 3}
"""
EVAL = """
init_from: base
tasks: tasks.jsonl
tools_server: {config: server.yaml}
sampler: {max_rows: 16, max_context_tokens: 112, prefill_chunk_tokens: 64}
rollout: {max_turns: 5, max_tokens_per_turn: 4, max_prompt_tokens: 64, call_retries: 0}
"""
SFT = """
demonstrations: miniature
model:
  vocab_size: 640
  hidden_size: 16
  intermediate_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  num_key_value_heads: 1
  head_dim: 8
  tie_word_embeddings: true
steps: 4
rows_per_step: 8
batch: {row_tokens: 80, micro_rows: 8}
optimizer: {learning_rate: 1e-3}
checkpoint: {every_steps: 1, keep: 2}
log_every: 1
"""


@dataclass
class Jorch:
    """The command line, run in folder `world`."""

    world: Path
    environment: dict[str, str]
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, through: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """In a process of its own, the leader of a group of its own, with both outputs piped.

        `through` is a command that runs the command that follows it.
        """
        script = "import sys; from jorch.cli import main; sys.exit(main())"
        child = subprocess.Popen(
            [*through, sys.executable, "-c", script, *arguments],
            cwd=self.world,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.children.append(child)
        return child

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        child = self.start(*arguments, **options)
        stdout, stderr = child.communicate(timeout=500)
        return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)

    def line(self, status: int, *arguments: str, **options: Any) -> str:
        """Run, check the exit status and that stderr is one line, and return that line."""
        result = self.run(*arguments, **options)
        assert result.returncode == status, result.stderr
        return only_line(result.stderr)

    def same_as(self, reference: Path, run_folder: Path | None = None) -> bool:
        """Whether run `rl` ended like the undisturbed one: in its weights and in every metric but times."""
        here, there = run_folder or self.world / "rl", reference / "rl"
        names = ("model/model.safetensors", "model/tokenizer.model", "trajectories.jsonl")
        files_agree = all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
        return files_agree and timeless(here) == timeless(there)

    def stray(self) -> list[str]:
        """Command lines of the living processes that work in the world's folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if (process / "cwd").readlink() == self.world and int(process.name) != os.getpid():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return found

    def wait(self, happened: Callable[[], object], what: str, timeout_s: float = 300.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
            time.sleep(0.01)

    def kill_all(self) -> None:
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which processes find each other's compiled programs."""
    folder = tmp_path_factory.mktemp("compile-cache")
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with tasks.jsonl, server.yaml, rl.yaml (out: rl), eval.yaml (out: eval) and sft.yaml (out: sft)."""
    write_world(tmp_path)
    return tmp_path


def write_world(folder: Path) -> None:
    miniature.write_jsonl(folder / "tasks.jsonl", miniature.tasks(MiniatureConfig(num_train=16), "train", 0))
    # Calls take a little time, so that a signal meant for one step does not meet the next one.
    server = {"experts": miniature.catalogue(), "seed": 0, "time_scale": 0.02}
    (folder / "server.yaml").write_text(yaml.safe_dump(server))
    for name, text in (("rl", RL), ("eval", EVAL), ("sft", SFT)):
        (folder / f"{name}.yaml").write_text(f"out: {name}{text}")


@pytest.fixture
def jorch(world: Path, compile_cache: dict[str, str]) -> Iterator[Jorch]:
    made = Jorch(world, {**os.environ, "JAX_PLATFORMS": "cpu", **compile_cache})
    yield made
    made.kill_all()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, compile_cache: dict[str, str]) -> Path:
    """A world in which `jorch rl rl.yaml` ran to its end, undisturbed."""
    folder = tmp_path_factory.mktemp("reference")
    write_world(folder)
    made = Jorch(folder, {**os.environ, "JAX_PLATFORMS": "cpu", **compile_cache})
    try:
        result = made.run("rl", "rl.yaml")
    finally:
        made.kill_all()
    assert (result.returncode, result.stderr) == (0, "")
    return folder


@pytest.fixture
def main(world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command line in this process, for mistakes that are found before anything is compiled.

    `main(2, "rl", "rl.yaml")` checks the exit status 2 and that stderr is one line, and returns that line.
    """
    monkeypatch.chdir(world)

    def run(status: int, *arguments: str) -> str:
        assert cli.main(arguments) == status
        return only_line(capfd.readouterr().err)

    return run


def timeless(run_folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that are times, or taken per second."""
    rows = read_jsonl(run_folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("time", "speed"))} for row in rows]


def only_line(stderr: str) -> str:
    """What one line on stderr says after `jorch: `."""
    assert stderr.startswith("jorch: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("jorch: ").rstrip("\n")

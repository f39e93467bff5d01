"""The command line as a user meets it: exit statuses, one-line errors, and what is imported when."""

import errno
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jorch import arguments, cli, config_io

CONFIGS = sorted(config_io.configs_dir().glob("*.yaml"))
RL = str(config_io.configs_dir() / "rl_qwen3_8b.yaml")
STAGES = ("quickstart", "sft", "rl", "eval", "tools-server")


def jorch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which fails where jax was imported."""
    script = (
        "import sys\nfrom jorch.cli import main\n"
        "try:\n    status = main()\nexcept SystemExit as stop:\n    status = stop.code\n"
        "heavy = [name for name in ('jax', 'flax', 'torch', 'tensorboardX', 'rich') if name in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("jorch: error: ")
    return result.stderr.removeprefix("jorch: error: ").rstrip("\n")


def command_of(path: Path) -> str:
    """The command that a shipped config is for: the first word of its name."""
    return "tools-server" if path.stem.startswith("tools_server") else path.stem.split("_")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_resolve_to_what_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    command = "sft" if path.name == "quickstart_base.yaml" else command_of(path)
    first = jorch(command, str(path), "--dry-run")
    assert (first.returncode, first.stderr) == (0, "")
    (tmp_path / "resolved.yaml").write_text(first.stdout)
    second = jorch(command, str(tmp_path / "resolved.yaml"), "--dry-run")
    assert second.stdout == first.stdout


@pytest.mark.parametrize("command", STAGES)
def test_help_lists_keys_with_defaults_without_jax(command: str) -> None:
    result = jorch(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"usage: jorch {command}" in result.stdout
    assert "seed  int  = 0" in result.stdout


def test_help_lists_every_command() -> None:
    result = jorch("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in (*STAGES, "export", "bench"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND (see `jorch --help`)"),
        (("lr",), "argument COMMAND: invalid choice: 'lr'"),
        (("rl",), "no config: write `jorch rl CONFIG.yaml`"),
        (("rl", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("rl", RL, "--resume", "--fresh"), "argument --fresh: not allowed with argument --resume"),
        (("rl", RL, "--sede=1"), "unrecognized arguments: --sede=1 (see `jorch rl --help`)"),
        (("rl", RL, "goup_size=8"), "command line: unknown key 'goup_size'; did you mean 'group_size'?"),
        (("rl", RL, "--dry-run", "seed=x"), "command line: 'seed' is the text 'x'; must be a valid integer"),
        (("export", "runs/a"), "the following arguments are required: --out"),
        (("bench", "lop"), "argument what: invalid choice: 'lop'"),
        (("bench", "kernels", "--tokens", "8"), "argument --tokens: got '8'; allowed: whole numbers from 64 tokens"),
        (("bench", "loop", "--only", "push"), "argument --only: loop has no part 'push'; it has none"),
        (("bench", "kernels", "--only", "push"), "argument --only: kernels has no part 'push'; it has causal, packed,"),
        (("tools-server", "nowhere.yaml"), "nowhere.yaml: no such file"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    assert one_line(jorch(*arguments)).startswith(message)


def test_overrides_and_options_may_be_mixed() -> None:
    result = jorch("rl", RL, "steps=3", "--dry-run", "optimizer.learning_rate=1e-5")
    assert "\nsteps: 3\n" in result.stdout
    assert "  learning_rate: 1.0e-05\n" in result.stdout


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Puts back how this process takes Ctrl-C, which `main` ignores once it has been interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def stage(monkeypatch: pytest.MonkeyPatch, run: Callable[..., object]) -> None:
    """Put `run` where the command line looks for the RL stage."""
    module = types.ModuleType("jorch.rl.loop")
    monkeypatch.setattr(module, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "jorch.rl.loop", module)
    monkeypatch.setattr("jorch.rl.loop", module, raising=False)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, f"interrupted; go on with: jorch rl {RL} steps=3 --resume"),
        (
            ConnectionError("tool server at http://127.0.0.1:1 is gone"),
            1,
            f"error: tool server at http://127.0.0.1:1 is gone; go on with: jorch rl {RL} steps=3 --resume",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl"),
            1,
            f"error: runs/a/metrics.jsonl: No space left on device; go on with: jorch rl {RL} steps=3 --resume",
        ),
        (
            OSError(errno.EACCES, os.strerror(errno.EACCES), "runs/a"),
            2,
            "error: runs/a: Permission denied",
        ),
        (
            OSError(errno.EADDRINUSE, "address ('127.0.0.1', 8900) already in use"),
            2,
            "error: address ('127.0.0.1', 8900) already in use",
        ),
        (
            ExceptionGroup("tasks", [ConnectionError("gone")]),
            1,
            f"error: gone; go on with: jorch rl {RL} steps=3 --resume",
        ),
    ],
)
@pytest.mark.usefixtures("interrupts")
def test_what_a_stage_raises_decides_line_and_status(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(config: object, resume: bool, fresh: bool) -> None:
        assert (resume, fresh) == (False, True)
        raise error

    stage(monkeypatch, run)
    assert cli.main(["rl", RL, "steps=3", "--fresh"]) == status
    assert capsys.readouterr().err == f"jorch: {line}\n"


def test_a_stages_own_value_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stage(monkeypatch, lambda config, **_: config_io.read_mapping(tmp_path / "nowhere.yaml"))
    assert cli.main(["rl", RL]) == 2
    assert capsys.readouterr().err == f"jorch: error: {tmp_path}/nowhere.yaml: no such file\n"


@pytest.mark.parametrize(
    "run",
    [
        lambda config, **_: int("x"),
        lambda config, **_: [].pop(),
        lambda config, **_: (_ for _ in ()).throw(AssertionError),
    ],
)
def test_errors_of_our_own_keep_their_traceback(run: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    stage(monkeypatch, run)
    with pytest.raises((ValueError, IndexError, AssertionError)):
        cli.main(["rl", RL])


QUICKSTART = """
rl:
  out: filled in
  init_from: base
  tasks: filled in
  tools_server: {config: filled in}
  steps: 80
  sampler: {max_context_tokens: 72}
  rollout: {max_tokens_per_turn: 8, max_prompt_tokens: 64}
  batch: {row_tokens: 256, micro_rows: 8}
  optimizer: {learning_rate: 1e-3}
"""


def test_quickstart_runs_its_embedded_config_unless_told_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart.yaml").write_text(QUICKSTART)
    (tmp_path / "mine.yaml").write_text(QUICKSTART + "miniature: {num_heldout: 7}\n")
    monkeypatch.setattr(config_io, "configs_dir", lambda: tmp_path)
    _, embedded, options = arguments.parse(["quickstart", "rl.steps=3", "--out", "on", "--seed", "2", "--fresh"])
    assert (embedded.out, embedded.seed, embedded.rl.steps, embedded.miniature.num_heldout) == ("on", 2, 3, 2048)
    assert (options.fresh, options.from_scratch) == (True, False)
    _, mine, _ = arguments.parse(["quickstart", str(tmp_path / "mine.yaml")])
    assert (mine.out, mine.miniature.num_heldout) == ("runs/quickstart", 7)


def test_the_tool_server_replaces_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(config_io.configs_dir() / "tools_server.yaml")
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: called.append([program, *arguments]))
    assert cli.main(["tools-server", path, "--port", "0"]) == 0
    expected = ["-m", "tools_server", "--config", path, "--port", "0"]
    assert called == [[sys.executable, sys.executable, *expected]]

"""Run folders with damage: a corrupt checkpoint is named, never used, and the one before it goes on to the same end."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def array_data(step: Path) -> Path:
    """The file that holds the arrays: the largest."""
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda step: flip(array_data(step)),
    "a truncated file": lambda step: os.truncate(array_data(step), 100_000),
    "an empty file": lambda step: os.truncate(array_data(step), 0),
    "a missing file": lambda step: array_data(step).unlink(),
    "a missing index": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "garbage in the metadata": lambda step: (step / "state" / "_METADATA").write_text("{]"),
    "no meta": lambda step: shutil.rmtree(step / "meta"),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "nothing": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.fixture
def stopped(jorch: Any, reference: Path) -> Path:
    """The checkpoints of a run that still has to export its model."""
    shutil.copytree(reference, jorch.world, dirs_exist_ok=True)
    shutil.rmtree(jorch.world / "rl" / "model")
    return jorch.world / "rl" / "checkpoints"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, jorch: Any, stopped: Path) -> None:
    DAMAGES[damage](stopped / "4")
    line = jorch.line(2, "rl", "rl.yaml", "--resume")
    assert line.startswith("error: checkpoint rl/checkpoints/4 cannot be read (")
    assert line.endswith("); remove that folder to go on from step 3, or pass --fresh to start again")
    assert sorted(path.name for path in stopped.iterdir()) == ["2", "3", "4"]


def test_a_run_goes_on_from_the_checkpoint_before(jorch: Any, stopped: Path, reference: Path) -> None:
    DAMAGES["a missing index"](stopped / "4")  # a flipped bit may lie in moments, which an export never reads
    assert jorch.line(2, "export", "rl", "--out", "exported").startswith("error: checkpoint rl/checkpoints/4 cannot")
    shutil.rmtree(stopped / "4")
    result = jorch.run("rl", "rl.yaml", "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference)


def test_no_checkpoint_before_the_damaged_one(jorch: Any, stopped: Path) -> None:
    for step in ("2", "3"):
        shutil.rmtree(stopped / step)
    flip(array_data(stopped / "4"))
    line = jorch.line(2, "rl", "rl.yaml", "--resume")
    assert line == (
        "error: checkpoint rl/checkpoints/4 cannot be read (its content does not match its checksum); "
        "pass --fresh to start again"
    )


def test_logs_with_damage_do_not_stop_a_run(jorch: Any, stopped: Path, reference: Path) -> None:
    """Half a line is what a kill leaves behind; what follows it is written anew."""
    shutil.rmtree(stopped / "4")
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        path = stopped.parent / name
        path.write_bytes(path.read_bytes()[:-70])
    result = jorch.run("rl", "rl.yaml", "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference)


def test_export_of_a_finished_and_of_an_unfinished_run(jorch: Any, stopped: Path, reference: Path) -> None:
    finished = jorch.run("export", str(reference / "rl"), "--out", "deep/finished")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == f"exported step 4 of {reference / 'rl'} to deep/finished\n"
    for path in (reference / "rl" / "model").iterdir():
        assert (jorch.world / "deep" / "finished" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(stopped / "4")
    (jorch.world / "unfinished").mkdir()
    unfinished = jorch.run("export", "rl", "--out", "unfinished")
    assert unfinished.stdout == "exported step 3 of rl to unfinished\n"
    evaluated = jorch.run("eval", "eval.yaml", "init_from=unfinished")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    assert "model" in json.loads((jorch.world / "eval" / "summary.json").read_text())


def test_export_while_behaviour_cloning_from_scratch(jorch: Any) -> None:
    """The run's tokenizer and architecture are nowhere but in its folder."""
    child = jorch.start("sft", "sft.yaml", "steps=100000")
    jorch.wait(lambda: (jorch.world / "sft" / "checkpoints" / "3").exists(), "a checkpoint")
    result = jorch.run("export", "sft", "--out", "exported")
    assert (result.returncode, result.stderr) == (0, "")
    assert child.poll() is None
    assert json.loads((jorch.world / "exported" / "config.json").read_text())["hidden_size"] == 16

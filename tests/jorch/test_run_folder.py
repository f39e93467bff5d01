"""A run folder belongs to one config and one process, and `--fresh` takes away only what a run wrote."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import Field

from jorch import config_io, sections
from jorch.run_folder import atomic_write, last_step, open_run_folder, read_jsonl


class Small(sections.Section):
    out: str = Field(description="run folder")
    steps: int = 3
    server: sections.ServerSection = sections.ServerSection(url="http://127.0.0.1:1")
    mesh: sections.MeshConfig = sections.MeshConfig()
    param_dtype: str = "float32"


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(out=str(tmp_path / "runs" / "a"))


def run_to_step(small: Small, step: int) -> Path:
    """A folder in which a run reached `step`."""
    with open_run_folder(small, resume=False, fresh=False) as folder:
        rows = [json.dumps({"step": s, "time_s": s * 1.0}) + "\n" for s in range(1, step + 1)]
        (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


def refusal(small: Small, resume: bool = False, fresh: bool = False) -> str:
    with pytest.raises(ValueError) as caught, open_run_folder(small, resume=resume, fresh=fresh):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(small.out, "OUT")


def test_a_new_folder_holds_the_resolved_config(small: Small) -> None:
    with open_run_folder(small, resume=False, fresh=False) as folder:
        assert config_io.load(folder / "config.yaml", Small) == small


def test_a_folder_with_a_run_asks_what_to_do_with_it(small: Small) -> None:
    run_to_step(small, 2)
    assert refusal(small) == (
        "OUT already holds a run, at step 2: pass --resume to go on, --fresh to start again, or another out="
    )
    with open_run_folder(small, resume=True, fresh=False) as folder:
        assert last_step(folder) == 2


def test_a_run_that_ended_before_its_first_step_needs_no_flag(small: Small) -> None:
    run_to_step(small, 0)
    with open_run_folder(small.model_copy(update={"steps": 4}), resume=False, fresh=False) as folder:
        assert "steps: 4" in (folder / "config.yaml").read_text()


def test_a_checkpoint_alone_is_a_run(small: Small) -> None:
    folder = run_to_step(small, 0)
    (folder / "checkpoints" / "7").mkdir(parents=True)
    assert refusal(small).startswith("OUT already holds a run")


@pytest.mark.parametrize("resume", [False, True])
def test_another_configs_run_is_refused_by_its_differing_keys(resume: bool, small: Small) -> None:
    folder = run_to_step(small, 2)
    other = small.model_copy(update={"steps": 9})
    assert refusal(other, resume=resume) == (
        "OUT holds a run of another config (steps=3 there, 9 here): pass --fresh to remove it, or choose another out="
    )
    assert config_io.load(folder / "config.yaml", Small) == small


def test_a_moved_server_or_folder_is_the_same_run(small: Small, tmp_path: Path) -> None:
    folder = run_to_step(small, 2).rename(tmp_path / "elsewhere")
    moved = Small(out=str(folder), server=sections.ServerSection(url="http://127.0.0.1:2"))
    with open_run_folder(moved, resume=True, fresh=False):
        assert last_step(folder) == 2


def test_a_run_goes_on_in_another_mesh_and_type(small: Small) -> None:
    folder = run_to_step(small, 2)
    moved = small.model_copy(update={"mesh": sections.MeshConfig(fsdp=2), "param_dtype": "bfloat16"})
    with open_run_folder(moved, resume=True, fresh=False):
        assert last_step(folder) == 2
    assert config_io.load(folder / "config.yaml", Small) == moved


def test_fresh_removes_the_run_and_nothing_else(small: Small) -> None:
    folder = run_to_step(small, 2)
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    other = small.model_copy(update={"steps": 9})
    with open_run_folder(other, resume=False, fresh=True):
        assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "notes.txt", "run.lock"]
    assert config_io.load(folder / "config.yaml", Small) == other


def test_fresh_refuses_a_folder_that_is_no_run_folder(small: Small) -> None:
    folder = Path(small.out)
    (folder / "checkpoints").mkdir(parents=True)
    assert refusal(small, fresh=True) == "OUT holds files but no config.yaml, so no run: choose another out="
    assert (folder / "checkpoints").is_dir()


HOLDER = """
import sys, time
from jorch import config_io
from jorch.run_folder import open_run_folder
sys.path.insert(0, {tests!r})
from test_run_folder import Small
with open_run_folder(Small(out={out!r}), resume=False, fresh=False):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_free_again_when_its_holder_is_killed(small: Small) -> None:
    script = HOLDER.format(tests=str(Path(__file__).parent), out=small.out)
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = refusal(small, fresh=True)
        assert message.startswith(f"OUT is in use by process {holder.pid} on ")
    finally:
        holder.kill()
        holder.communicate()
    with open_run_folder(small, resume=False, fresh=False):
        pass


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """Root may write everywhere, so give that up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.usefixtures("unprivileged")
def test_a_folder_without_write_permission_is_named() -> None:
    with (
        pytest.raises(PermissionError) as caught,
        open_run_folder(Small(out="/runs/a"), resume=False, fresh=False),
    ):
        pass
    assert caught.value.filename == "/runs/a"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    small = Small(out=str(tmp_path / "file" / "a"))
    with pytest.raises(NotADirectoryError) as caught, open_run_folder(small, resume=False, fresh=False):
        pass
    assert caught.value.filename == small.out


def test_atomic_write_replaces_a_file_whole(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", "old" * 1000)
    atomic_write(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_failed_atomic_write_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    atomic_write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_write(tmp_path / "a.json", "new")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]

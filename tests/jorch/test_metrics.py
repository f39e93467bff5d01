"""Metrics survive kills and resumes, and what a person waits for is one line where there is no terminal."""

import json
import math
from pathlib import Path

import pytest

from jorch import metrics
from jorch.metrics import MetricWriter, stage

NAME, OTHER, *_ = metrics.METRICS


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step_readable_at_once(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {NAME: 0.5})
        assert [(row["step"], row[NAME]) for row in rows(tmp_path)] == [(0, 0.5)]
        writer.write(1, {NAME: 0.75, OTHER: 0.1})
    first, second = rows(tmp_path)
    assert second.keys() == {"step", "time_s", NAME, OTHER}
    assert 0 <= first["time_s"] <= second["time_s"]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    with MetricWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {NAME: step / 4})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    found = []
    while content:  # a record: u64 length, u32 crc, the event, u32 crc
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    assert found == [(step, NAME, step / 4) for step in range(3)]


def test_resuming_forgets_later_steps_and_half_a_line(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {NAME: float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    with MetricWriter(tmp_path, resume_step=3) as writer:
        assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
        writer.write(3, {NAME: 30.0})
    kept = rows(tmp_path)
    assert [row[NAME] for row in kept] == [0.0, 1.0, 2.0, 30.0]
    assert kept[3]["time_s"] >= kept[2]["time_s"]


def test_a_new_run_begins_with_an_empty_file(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {NAME: 1.0})
    with MetricWriter(tmp_path):
        assert rows(tmp_path) == []


def test_numbers_that_json_cannot_say_are_null(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {NAME: math.nan, OTHER: math.inf})
    assert rows(tmp_path)[0][NAME] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_an_unlisted_name_is_our_own_mistake(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer, pytest.raises(AssertionError, match="reward/maen"):
        writer.write(0, {"reward/maen": 1.0})


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer._file = (tmp_path / "metrics.jsonl").open("a")
    with pytest.raises(OSError, match="No space left on device") as caught:
        writer.write(0, {NAME: 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_names_are_groups_and_carry_a_description() -> None:
    for name, description in metrics.METRICS.items():
        assert name.count("/") == 1
        assert name == name.lower()
        assert description


def test_a_stage_is_one_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("training", total=3) as work:
        for i in range(3):
            work.advance(reward=i / 4)
    name, count, _, *rest = capsys.readouterr().out.split()
    assert (name, count, rest) == ("training", "3/3", ["s", "reward", "0.5"])


def test_a_long_stage_says_now_and_then_that_it_lives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(seconds))
    with stage("training", total=100) as work:
        for _ in range(100):
            work.advance()
    counts = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert counts[-1] == "100/100"
    assert 10 < len(counts) < 60


def test_a_stage_that_is_cut_short_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with stage("training", total=3) as training:
            training.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    name, count, _, unit, last = capsys.readouterr().out.split()
    assert (name, count, unit, last) == ("training", "1/3", "s", "stopped")


def test_a_terminal_gets_a_bar_and_then_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stage("training", total=2) as work:
        work.advance(reward=0.5)
        work.advance(reward=0.75)
    out = capsys.readouterr().out
    assert "━" in out
    assert out.splitlines()[-1].endswith(" s  reward 0.75")

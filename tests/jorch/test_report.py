"""The report and the terminal's table, on a made-up run: tasks played by arithmetic, curves by formula."""

import io
import itertools
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from jorch.evals.baselines import POLICIES, choose
from jorch.evals.labels import Mark, place_labels
from jorch.evals.metrics import summarise
from jorch.evals.plots import trend
from jorch.evals.report import write_report
from jorch.evals.sections import dollars, duration
from jorch.evals.svg import new_axes, report_style
from jorch.evals.tables import changes, headline, results_table
from jorch.rollout.outcomes import EvalRow, row_from
from jorch.rollout.records import trajectory_record
from jorch.run_folder import read_jsonl
from jorch.synth.miniature import call_text, make_task, observation
from jorch.types import Completion, Task, ToolCall, ToolResult, Trajectory, Turn

HOSTILE = '<script>alert("x")</script>'


def play(task: Task, plan: list[str]) -> Trajectory:
    """What the tool server would say to these aliases, each called in a turn of its own."""
    experts, capable = task.truth["experts"], task.truth["capable"]
    turns, solved = [], True
    for number, alias in enumerate(plan):
        expert = experts[alias]
        solved &= alias in capable[expert["function"]]
        content = "answered" if expert["function"] == "answer" else observation(task, alias)
        turns.append(
            Turn(
                np.arange(40 + 7 * number, dtype=np.int32),
                Completion(
                    np.array([7, 19, 9, 2], np.int32), np.array([0, -0.7, 0, 0], np.float32), "stop", np.full(4, 3)
                ),
                (ToolCall(str(number), expert["function"], {"model": alias}),),
                (ToolResult(str(number), alias, content, expert["cost_usd"], expert["latency_s"], None, False),),
            )
        )
    return Trajectory(
        task_id=task.task_id,
        trajectory_id=f"{task.task_id}/{'-'.join(plan)}",
        turns=tuple(turns),
        termination="answered",
        outcome=float(solved),
        num_malformed=0,
        cost_usd=sum(experts[alias]["cost_usd"] for alias in plan),
        latency_s=sum(experts[alias]["latency_s"] for alias in plan),
        tool_counts={alias: 1 for alias in plan},
    )


def plan_of(policies: dict[str, float], task: Task, rng: random.Random) -> list[str]:
    """One alias per needed function, each from a policy drawn by weight; "any" may be incapable."""

    def pick(function: str) -> str:
        [policy] = rng.choices(list(policies), list(policies.values()))
        if policy == "any":
            return rng.choice([a for a, e in task.truth["experts"].items() if e["function"] == function])
        return choose(policy, task, function, rng)

    return [pick(function) for function in (*task.truth["needs"], "answer")]


def rows_of(policies: dict[str, float], tasks: list[Task]) -> list[EvalRow]:
    rng, rows = random.Random(1), []
    for task in tasks:
        t = play(task, plan_of(policies, task, rng))
        rows.append(row_from(task, t.outcome, t.cost_usd, t.latency_s, t.tool_counts, t.format_valid, t.termination))
    return rows


def make_summary() -> dict[str, Any]:
    rng = random.Random(0)
    tasks = [make_task(rng, True, f"heldout-{i:06d}", "heldout") for i in range(600)]
    base = {"always_strongest": 0.85, "random_capable": 0.15}
    trained = {"oracle": 0.95, "any": 0.05}
    noisy = {"oracle": 0.88, "any": 0.12}
    return {
        "base": summarise(rows_of(base, tasks)) | {"temperature_1": summarise(rows_of({"any": 0.1, **base}, tasks))},
        "trained": summarise(rows_of(trained, tasks)) | {"temperature_1": summarise(rows_of(noisy, tasks))},
        "baselines": {name: summarise(rows_of({name: 1.0}, tasks)) for name in POLICIES},
        "wall_s": {
            "tool_server": 0.8,
            "tasks": 1.9,
            "evaluate_base": 21.0,
            "rl": 131.0,
            "evaluate": 44.0,
            "export": 1.2,
        },
        "seed": 0,
        "versions": {
            "jorch": "0.1.0",
            "python": "3.11.9",
            "jax": "0.10.2",
            "flax": "0.12.8",
            "numpy": "2.4.6",
        },
        "settings": {"eval_tasks": 600, "rl": {"steps": 80, "tasks_per_step": 24, "group_size": 8}},
    }


def make_metrics(num_steps: int) -> list[dict[str, float]]:
    noise = np.random.default_rng(0).normal(size=(num_steps, 10))
    rows = []
    for step, n in enumerate(noise):
        done = 1 - np.exp(-step / 25)
        rows.append(
            {
                "step": step,
                "time_s": 1.4 * step,
                "reward/mean": 0.35 + 0.3 * done + 0.03 * n[0],
                "rollout/utility": 0.7 + 0.13 * done + 0.015 * n[1],
                "rollout/accuracy": min(1.0, 0.965 + 0.02 * done + 0.008 * n[2]),
                "rollout/cost_usd": 0.0111 - 0.0025 * done + 0.0002 * n[3],
                "rollout/latency_s": 6.4 - 1.2 * done + 0.15 * n[4],
                "rollout/preference_followed": 0.42 + 0.48 * done + 0.03 * n[5],
                "rollout/format_valid": min(1.0, 0.995 + 0.004 * n[6]),
                "group/dropped_fraction": max(0.0, 0.1 + 0.5 * done + 0.05 * n[7]),
                "policy/entropy_nats": 0.18 - 0.09 * done + 0.006 * n[8],
                "time/step_s": 1.4 + 0.05 * n[9],
                "time/sample_s": 0.42,
                "time/tools_s": 0.08,
                "time/pack_s": 0.03,
                "time/learn_s": 0.85,
            }
        )
    return rows


def make_trajectories(steps: tuple[int, ...]) -> list[dict[str, Any]]:
    rng, records = random.Random(3), []
    for step in steps:
        for index in range(2):
            task = make_task(rng, False, f"train-{step:03d}{index:03d}", "train", kind="avoid")
            for _ in range(8):
                t = play(task, plan_of({"random_capable": 0.8, "any": 0.2}, task, rng))
                reward = t.outcome * (1 - 40 * t.cost_usd)
                texts = [task.messages[0]["content"], *(call_text(turn.results[0].tool) for turn in t.turns)]
                records.append(trajectory_record(step, task, t, reward, 4 * reward - 2.5, texts))
    return records


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(make_summary()), encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 0\nrl:\n  steps: 80\n", encoding="utf-8")
    write_lines(folder / "metrics.jsonl", make_metrics(80))
    write_lines(folder / "trajectories.jsonl", make_trajectories((0, 40, 79)))
    return folder


class Page(HTMLParser):
    """Checks that elements nest and collects what the page holds."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action") or name.startswith("on"):
                self.addresses.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def test_report_is_well_formed_and_self_contained(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    # XML name spaces are the only addresses, and none is ever fetched.
    assert text.count("http") == text.count('="http://www.w3.org/') + text.count("<meta http-equiv")
    assert page.tags.count("svg") == 2 + 3 + 9


def test_report_shows_what_the_files_say(run_folder: Path) -> None:
    words = " ".join(" ".join(Page(write_report(run_folder).read_text(encoding="utf-8")).words).split())
    summary = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
    assert headline(summary) in words
    assert f"{summary['trained']['utility']['mean']:.3f}" in words
    assert f"{1e3 * summary['baselines']['oracle']['cost_usd']['mean']:.2f}" in words
    low, high = summary["trained"]["temperature_1"]["accuracy"]["ci95"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in words
    assert "3 min 20 s" in words
    assert "Step 0, train-000" in words
    assert "Step 79, train-079" in words
    assert "Step 40" not in words
    assert "rl.tasks_per_step" in words


def test_report_escapes_what_the_model_and_the_tools_wrote(run_folder: Path) -> None:
    clean = Page(write_report(run_folder).read_text(encoding="utf-8")).tags
    records = read_jsonl(run_folder / "trajectories.jsonl")
    for record in records:
        record["prompt"] = record["task_id"] = HOSTILE
        record["preference"] = {HOSTILE: 1.0}
        for turn in record["turns"]:
            turn["text"] = HOSTILE
            turn["calls"] = [{"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}]
            turn["results"][0] |= {"content": HOSTILE, "error": HOSTILE}
    write_lines(run_folder / "trajectories.jsonl", records)
    summary = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
    summary["versions"][HOSTILE] = HOSTILE
    summary["base"]["expert_shares"] = {HOSTILE: 1.0}
    summary["baselines"][HOSTILE] = summary["baselines"].pop("random_capable")
    (run_folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (run_folder / "config.yaml").write_text(f"out: {HOSTILE}\n", encoding="utf-8")
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 20
    assert Page(text).tags.count("pre") <= clean.count("pre")


def test_report_of_an_evaluation_alone_leaves_out_what_it_lacks(run_folder: Path) -> None:
    for name in ("metrics.jsonl", "trajectories.jsonl", "config.yaml"):
        (run_folder / name).unlink()
    rows = [EvalRow(f"t{i}", 1.0, 1.0, 0.3, 50.0, None, 1.0, {"get_user": 2}, "answered") for i in range(50)]
    summary = {"base": summarise(rows), "baselines": {}, "seed": 0}
    (run_folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.words).split())
    assert "Base solved 100.0 % of 50 tasks at $0.3000 a task." in words
    assert "Trajectories to read" not in words
    assert "Where the time went" not in words
    assert "cost, $" in words


def test_report_without_a_summary_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"summary\.json: not found"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{\n  oops", encoding="utf-8")
    with pytest.raises(ValueError, match=r"summary\.json:2: not JSON"):
        write_report(tmp_path)


def test_terminal_table_fits_100_columns() -> None:
    summary = make_summary()
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(results_table(summary))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 100
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]
    [trained] = [line for line in lines if line.strip().startswith("trained")]
    assert f"{summary['trained']['utility']['mean']:.3f} ±0" in trained
    assert "cost, m$" in console.file.getvalue()  # type: ignore[attr-defined]
    assert sum("always strongest" in line for line in lines) == 1


def entry(utility: float, accuracy: float, cost_usd: float, followed: float | None) -> dict[str, Any]:
    means = {"utility": utility, "accuracy": accuracy, "cost_usd": cost_usd, "preference_followed": followed}
    return {key: {"mean": mean, "ci95": [None, None]} for key, mean in means.items()}


def test_headline_follows_the_data() -> None:
    base, oracle = entry(0.70, 1.0, 0.010, 0.4), entry(0.90, 1.0, 0.008, 1.0)
    better = {"base": base, "trained": entry(0.85, 0.985, 0.0076, 0.9), "baselines": {"oracle": oracle}}
    assert headline(better) == (
        "Training closed 75 % of the utility gap between base and oracle; "
        "cost −24 %, accuracy −1.5 points, preferences followed +50 points."
    )
    worse = better | {"trained": entry(0.6, 1.0, 0.0100001, 0.3)}
    assert headline(worse) == (
        "Training closed none of the utility gap between base and oracle: utility fell from 0.700 to 0.600; "
        "cost 0 %, accuracy 0.0 points, preferences followed −10 points."
    )
    alone = {"base": base, "trained": entry(0.85, 1.0, 0.005, None), "baselines": {}}
    assert headline(alone) == "Training moved utility from 0.700 to 0.850; cost −50 %, accuracy 0.0 points."
    assert changes(alone).gap_closed is None
    assert headline({}) == "No policy was evaluated."


def test_trajectory_record_survives_json() -> None:
    task = make_task(random.Random(5), False, "train-5", "train")
    trajectory = play(task, plan_of({"oracle": 1.0}, task, random.Random(0)))
    texts = ["prompt", *["text"] * len(trajectory.turns)]
    record = trajectory_record(3, task, trajectory, np.float32(0.5), np.float32(-1.0), texts)
    again = json.loads(json.dumps(record))
    assert again == record
    assert again["turns"][0]["token_ids"] == [7, 19, 9, 2]
    logprobs = np.array(again["turns"][0]["logprobs"], np.float32)
    np.testing.assert_array_equal(logprobs, trajectory.turns[0].completion.logprobs)
    assert again["cost_usd"] == sum(turn["results"][0]["cost_usd"] for turn in again["turns"])


def test_trend_keeps_lines_and_calms_noise() -> None:
    line = 2.0 * np.arange(40) - 5
    np.testing.assert_allclose(trend(line), line, atol=1e-9)
    np.testing.assert_allclose(trend(line[:2]), line[:2], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=200)
    assert trend(noise).std() < 0.5 * noise.std()


@report_style
def test_labels_of_crowded_points_do_not_overlap() -> None:
    axes = new_axes(4.3, 3.0)
    axes.set(xlim=(7, 12), ylim=(95, 102))
    costs = {"base": 10.8, "always strongest": 10.9, "oracle": 8.7, "fastest capable": 9.3, "trained": 8.8}
    place_labels(axes, [Mark(name, np.array([x, 100.0]), np.full((2, 2), 0.2)) for name, x in costs.items()], "k")
    assert [text.get_text() for text in axes.texts] == list(costs)
    axes.get_figure(root=True).draw_without_rendering()
    # Not the annotation's own extent, which holds its leader too.
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0042, "4.2 ms"), (3.14, "3.1 s"), (59.6, "1 min 0 s"), (204.2, "3 min 24 s"), (7322, "2 h 2 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_dollars() -> None:
    assert [dollars(usd) for usd in (0.0, 0.003, 12.5, 4e-6)] == ["$0", "$0.003", "$12.5", "$4.00e-06"]

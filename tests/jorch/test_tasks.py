"""Task files as they come: ToolScale's rows, jorch's own, and rows that nobody can read."""

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from jorch.data.tasks import TaskStream, from_row, read_jsonl, to_row
from jorch.sections import MiniatureConfig
from jorch.synth import miniature

TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}

# The shape of the released rows, every value made up.
QA_ROW = {
    "id": "q-17",
    "index": "stem____17",
    "category": "qa",
    "problem": "How many moons has Datu?\nUse reasoner-2 as little as you can.",
    "answer": "4",
    "tools": [TOOL],
    "model_mapping": {"search-1": "model-a", "answer-1": "model-b"},
    "tool_pricing": {
        "model-a": {"input_tokens_per_million": 2.5e-7, "output_tokens_per_million": 2e-6},
        "model-b": {"input_tokens_per_million": 0.9, "output_tokens_per_million": 1.25},
        "model-c": 3.0,
    },
    "pref_vec": {"accuracy": 3, "cost": 0.1, "latency": 0.1, "reasoner-2": -1},
}
USER = {"instructions": {"domain": "bank", "reason_for_call": "A card is lost.", "known_info": "You are Ida."}}
EXAMPLE = {"id": "task-3", "user_scenario": USER, "evaluation_criteria": {"actions": [], "communicate_info": []}}
FUNC_ROW = {"id": "f-3", "index": "bank____3", "category": "func_call", "tools": [TOOL], "example": EXAMPLE}
HUB_ROW = {"description": {"purpose": "lost card"}, "initial_state": None, **EXAMPLE}


def test_a_qa_row():
    task = from_row(QA_ROW)
    assert (task.task_id, task.environment, task.answer, task.domain, task.split) == (
        "q-17",
        "experts",
        "4",
        "stem",
        "train",
    )
    assert task.messages == ({"role": "user", "content": QA_ROW["problem"]},)
    assert task.tools == (TOOL,)
    assert task.setup["model_mapping"] == QA_ROW["model_mapping"]
    assert task.preference == {"outcome": 3.0, "cost": 0.1, "latency": 0.1, "reasoner-2": -1.0}
    assert task.truth == {}


def test_prices_per_token_in_fields_named_per_million_become_prices_per_million():
    """The released rows hold both; the dearer of input and output counts."""
    pricing = from_row(QA_ROW).setup["tool_pricing"]
    assert {name: price["usd_per_million_tokens"] for name, price in pricing.items()} == pytest.approx(
        {"model-a": 2.0, "model-b": 1.25, "model-c": 3.0}
    )


def test_a_func_call_row():
    task = from_row(FUNC_ROW)
    assert (task.task_id, task.environment, task.domain) == ("f-3", "toolscale", "bank")
    assert task.setup == {"domain": "bank", "task": EXAMPLE}
    assert task.messages == ({"role": "user", "content": "A card is lost.\nYou are Ida."},)
    assert task.preference == {"outcome": 1.0, "cost": 0.0, "latency": 0.0}


def test_rows_with_a_tool_that_no_environment_has_are_reported_by_line(tmp_path, capsys):
    def offering(*tools):
        return FUNC_ROW | {"tools": list(tools)}

    def expert(name):
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}

    rows = [offering(TOOL), *(offering(TOOL, expert("call_expert")) for _ in range(7))]
    path = write_rows(tmp_path / "t.jsonl", [row | {"id": f"f-{i}"} for i, row in enumerate(rows)])
    tasks = read_jsonl(path)
    assert [task.tools for task in tasks] == [(TOOL,)] * 8
    assert capsys.readouterr().err == (
        f"{path}: 7 row(s) offer the tool 'call_expert', which no environment has (line 2, 3, 4, 5, 6, ...): "
        "they are played without it\n"
    )
    write_rows(path, rows[:1])
    read_jsonl(path)
    assert capsys.readouterr().err == ""


def test_a_row_of_the_published_set():
    """A tau2 task without a wrapper: no category, no problem, no tools."""
    task = from_row(HUB_ROW)
    assert (task.task_id, task.environment, task.tools) == ("task-3", "toolscale", ())
    assert task.setup == {"domain": "bank", "task": {key: HUB_ROW[key] for key in HUB_ROW if HUB_ROW[key]}}


def test_a_row_of_one_of_tau2s_own_domains_names_its_task():
    user = {"instructions": {"domain": "airline", "reason_for_call": "Fly."}}
    task = from_row(HUB_ROW | {"user_scenario": user})
    assert (task.environment, task.setup) == ("tau2", {"domain": "airline", "task_id": "task-3"})


def test_gold_calls_lose_their_padding():
    action = {"action_id": "a_0", "name": "freeze", "arguments": {"card": "c1", "amount": None}}
    criteria = {"actions": [action], "communicate_info": ["frozen"], "nl_assertions": None}
    truth = from_row(HUB_ROW | {"evaluation_criteria": criteria}).truth
    assert truth == {"gold": [{"name": "freeze", "arguments": {"card": "c1"}}], "communicate_info": ["frozen"]}


def test_own_rows_survive_the_file(tmp_path):
    tasks = [miniature.make_task(random.Random(i), False, f"train-{i}", "train") for i in range(50)]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(to_row(task)) + "\n" for task in tasks))
    assert read_jsonl(path) == tasks


def write_rows(path: Path, rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not valid JSON ("),
        ("[" * 100_000, "not valid JSON ("),
        ("[1]", "list, not a JSON object"),
        ("null", "NoneType, not a JSON object"),
        ({}, "no 'id' (nor 'index')"),
        (QA_ROW | {"category": "chat"}, "'category' is 'chat'; allowed: 'qa', 'func_call'"),
        ({"id": 1}, "no 'problem'"),
        (QA_ROW | {"problem": None}, "'problem' is NoneType, not str"),
        (QA_ROW | {"model_mapping": []}, "'model_mapping' is list, not dict"),
        (QA_ROW | {"tools": "search"}, "'tools' is str, not list"),
        (QA_ROW | {"tools": ["search"]}, "'tools' holds str, not dict"),
        (QA_ROW | {"tool_pricing": ["model-a"]}, "'tool_pricing' is list, not dict"),
        (QA_ROW | {"tool_pricing": {"model-a": {}}}, "'tool_pricing.model-a' holds no number"),
        (QA_ROW | {"pref_vec": {"cost": "high"}}, "'pref_vec' is not an object of numbers"),
        (QA_ROW | {"truth": 1}, "'truth' is int, not dict"),
        ({"id": 1, "category": "func_call"}, "no 'example'"),
        (
            HUB_ROW | {"evaluation_criteria": {"actions": [{"name": "freeze"}, "freeze"]}},
            "'evaluation_criteria.actions[1]' is no object with a string 'name'",
        ),
        (FUNC_ROW | {"example": {"user_scenario": USER}}, "no 'evaluation_criteria'"),
        (FUNC_ROW | {"tools": {"name": "search"}}, "'tools' is dict, not list"),
        (FUNC_ROW | {"example": {"id": 1}}, "no 'user_scenario'"),
        (FUNC_ROW | {"example": {"user_scenario": {}}}, "'user_scenario.instructions' is missing or not an object"),
    ],
)
def test_an_unreadable_row_is_named_by_its_line(row, reason, tmp_path):
    path = write_rows(tmp_path / "tasks.jsonl", [QA_ROW | {"id": "another"}, "", row])
    with pytest.raises(ValueError) as caught:
        read_jsonl(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: 1 unreadable row(s): line 3: {reason}")
    assert line.endswith("; fix or remove them")
    assert "\n" not in line


def test_many_unreadable_rows_are_counted(tmp_path):
    path = write_rows(tmp_path / "tasks.jsonl", ["{"] * 8)
    with pytest.raises(ValueError, match=r"8 unreadable row\(s\): line 1: .*line 5: .*; and 3 more; fix"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "no tasks in it"), ([QA_ROW, QA_ROW], "task id 'q-17' occurs twice; ids must be unique")],
)
def test_a_file_without_distinct_tasks_is_refused(rows, message, tmp_path):
    path = write_rows(tmp_path / "tasks.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)
    with pytest.raises(ValueError, match=r"no task file at .*nowhere; set `tasks` to a JSONL of tasks"):
        read_jsonl(tmp_path / "nowhere")


TASKS = list(islice(miniature.tasks(MiniatureConfig(num_train=10), "train", 0), 10))


def ids(tasks):
    return [task.task_id for task in tasks]


def test_a_step_s_tasks_depend_on_seed_and_step_alone():
    stream = TaskStream(TASKS, 4, seed=1)
    batches = [ids(stream.batch(step)) for step in range(10)]
    assert ids(TaskStream(TASKS, 4, seed=1).batch(7)) == batches[7], "without the steps before it"
    assert [ids(TaskStream(TASKS, 4, seed=2).batch(step)) for step in range(10)] != batches


def test_every_epoch_meets_every_task_once_in_an_order_of_its_own():
    stream = TaskStream(TASKS, 4, seed=0)
    order = [task_id for step in range(10) for task_id in ids(stream.batch(step))]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(Counter(epoch) == Counter(ids(TASKS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_file():
    assert Counter(ids(TaskStream(TASKS, 25, seed=0).batch(1))).most_common()[-1][1] >= 2

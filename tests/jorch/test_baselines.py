"""The baselines, played on miniature tasks through a real tool server in a process of its own."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jorch.evals.baselines import POLICIES, choose, play
from jorch.rollout.outcomes import EvalRow, row_from
from jorch.rollout.server_process import start_tool_server
from jorch.rollout.tool_client import ToolClient, ToolServerDown
from jorch.synth.miniature import catalogue, make_task
from jorch.types import Task

TASKS = [make_task(random.Random(i), True, f"heldout-{i:06d}", "heldout") for i in range(250)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.yaml").write_text(yaml.safe_dump({"experts": catalogue()}), encoding="utf-8")
    with start_tool_server(folder / "server.yaml", folder / "server.log") as url:
        yield url


def run(url: str, policy: str, tasks: list[Task], seed: int = 0, concurrency: int = 64) -> list[EvalRow]:
    async def session() -> list[EvalRow]:
        async with ToolClient(url, timeout_s=30.0, retries=0) as client:
            return await play(policy, tasks, client, seed, concurrency)

    return asyncio.run(session())


def best_utility(task: Task) -> float:
    """Over every plan of one alias per needed function, capable or not."""
    experts, capable = task.truth["experts"], task.truth["capable"]
    functions = (*task.truth["needs"], "answer")
    utilities = []
    for plan in itertools.product(*([a for a in experts if experts[a]["function"] == f] for f in functions)):
        solved = all(alias in capable[f] for alias, f in zip(plan, functions, strict=True))
        cost_usd = sum(experts[a]["cost_usd"] for a in plan)
        latency_s = sum(experts[a]["latency_s"] for a in plan)
        row = row_from(task, solved, cost_usd, latency_s, dict.fromkeys(plan, 1), True, "answered")
        utilities.append(row.utility)
    return max(utilities)


@pytest.fixture(scope="module")
def played(url: str) -> dict[str, list[EvalRow]]:
    return {policy: run(url, policy, TASKS) for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_baseline_solves_every_task_with_the_calls_it_needs(policy: str, played: dict[str, list[EvalRow]]) -> None:
    assert [row.task_id for row in played[policy]] == [task.task_id for task in TASKS]
    for row, task in zip(played[policy], TASKS, strict=True):
        assert (row.accuracy, row.format_valid, row.termination) == (1.0, 1.0, "answered")
        assert sum(row.expert_counts.values()) == 1 + len(task.truth["needs"])
        assert row.cost_usd > 0
        assert row.latency_s > 0


def test_the_oracle_reaches_the_best_utility_of_every_task(played: dict[str, list[EvalRow]]) -> None:
    for index, task in enumerate(TASKS):
        best = best_utility(task)
        assert played["oracle"][index].utility == pytest.approx(best, abs=1e-12)
        for policy in POLICIES:
            assert played[policy][index].utility <= best + 1e-12


def test_each_baseline_does_what_its_name_says(played: dict[str, list[EvalRow]]) -> None:
    for index, task in enumerate(TASKS):
        experts, kind = task.truth["experts"], task.truth["kind"]
        highest = {
            f: max(e["skill"] for e in experts.values() if e["function"] == f) for f in (*task.truth["needs"], "answer")
        }
        strongest = played["always_strongest"][index].expert_counts
        assert strongest == {f"{f} skill {skill}": 1 for f, skill in highest.items()}
        cost_usd = {policy: played[policy][index].cost_usd for policy in POLICIES}
        latency_s = {policy: played[policy][index].latency_s for policy in POLICIES}
        assert cost_usd["cheapest_capable"] == pytest.approx(min(cost_usd.values()))
        assert latency_s["fastest_capable"] == pytest.approx(min(latency_s.values()))
        if kind == "cheap":
            assert played["cheapest_capable"][index].followed == 1
        if kind == "fast":
            assert played["fastest_capable"][index].followed == 1
        if kind != "none":
            assert played["oracle"][index].followed == 1


def test_rows_depend_on_the_seed_only(url: str, played: dict[str, list[EvalRow]]) -> None:
    assert run(url, "random_capable", TASKS, concurrency=3) == played["random_capable"]
    assert run(url, "random_capable", TASKS, seed=1) != played["random_capable"]


def test_ties_are_broken_at_random() -> None:
    task = TASKS[0]
    expert = task.truth["experts"]["answer-1"]
    same = {alias: expert for alias in ("answer-1", "answer-2", "answer-3")}
    truth = task.truth | {"experts": same, "capable": {"answer": list(same)}, "kind": "none", "subject": None}
    tied = replace(task, truth=truth)
    for policy in POLICIES:
        rng = random.Random(0)
        assert {choose(policy, tied, "answer", rng) for _ in range(60)} == set(same)


def test_the_verdict_is_the_server_s(url: str) -> None:
    """What the truth calls capable fails where the session's own difficulty says so."""
    hard = [replace(task, setup=task.setup | {"simulation": {"domain": "math", "difficulty": 9}}) for task in TASKS[:5]]
    for row in run(url, "oracle", hard):
        assert (row.accuracy, row.utility) == (0.0, 0.0)
        assert row.cost_usd > 0
        assert row.termination == "answered"


def test_a_refused_task_is_named(url: str) -> None:
    mapping = dict.fromkeys(TASKS[0].setup["model_mapping"], "sim-nobody")
    stranger = replace(TASKS[0], setup=TASKS[0].setup | {"model_mapping": mapping})
    with pytest.raises(ValueError, match=r"task heldout-000000: .*sim-nobody"):
        run(url, "oracle", [stranger])


def test_a_server_that_dies_stops_the_play(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(yaml.safe_dump({"experts": catalogue()}), encoding="utf-8")

    async def session() -> None:
        with start_tool_server(tmp_path / "server.yaml", tmp_path / "server.log") as url:
            client = await ToolClient(url, timeout_s=5.0, retries=0).__aenter__()
        try:
            with pytest.raises(ToolServerDown, match=url):
                await play("oracle", TASKS, client, 0, 16)
        finally:
            await client.__aexit__(None, None, None)

    asyncio.run(session())

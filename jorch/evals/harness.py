"""`jorch eval`: a policy plays tasks through the tool server, and its results are summarised."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jorch.config import EndpointConfig, EvalConfig
from jorch.data.tasks import read_jsonl
from jorch.evals import baselines, tables
from jorch.evals.chat_endpoint import ChatEndpoint
from jorch.evals.chat_policy import play_chat
from jorch.evals.metrics import summarise
from jorch.export import pretrained
from jorch.metrics import stage
from jorch.rollout.driver import Driver
from jorch.rollout.outcomes import EvalRow, trajectory_row
from jorch.rollout.server_process import tool_server
from jorch.rollout.tool_client import ToolClient, ToolServerDown
from jorch.run_folder import atomic_write, open_run_folder
from jorch.sections import computation
from jorch.serving.samplers import make_sampler
from jorch.sharding import make_mesh
from jorch.types import Task
from jorch.versions import versions

_CONCURRENCY = 256
_TAU2 = "tau2:"


def run(config: EvalConfig, *, fresh: bool = False) -> None:
    """Play, print the table, write OUT/summary.json. Raises ValueError for what a user can mend."""
    with open_run_folder(config, resume=not fresh, fresh=fresh) as folder:
        tasks = _load_tasks(config)
        _check_policy(config, tasks)
        began = time.perf_counter()
        with tool_server(config.tools_server, folder / "tools_server.log") as url:
            results = asyncio.run(_play(config, tasks, url, folder))
        summary = {
            **results,
            "wall_s": {"evaluation": time.perf_counter() - began},
            "seed": config.seed,
            "versions": versions(),
            "settings": {"tasks": config.tasks, "policy": config.policy, "num_tasks": len(tasks)},
        }
        atomic_write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        tables.print_results(summary)
        print(f"summary: {folder / 'summary.json'}")


def _load_tasks(config: EvalConfig) -> list[Task]:
    if config.tasks.startswith(_TAU2):
        from jorch.evals.tau2 import load_tasks

        return load_tasks(config.tasks.removeprefix(_TAU2), config.limit)
    return read_jsonl(Path(config.tasks))[: config.limit]


def _check_policy(config: EvalConfig, tasks: list[Task]) -> None:
    """Refuse what the tasks have no ground truth for."""
    if config.policy == "gold" and not all("gold" in task.truth for task in tasks):
        raise ValueError(f"policy: gold replays the calls of tau2 tasks; {config.tasks} has none: set policy=model")
    if config.baselines and not all("capable" in task.truth for task in tasks):
        raise ValueError(f"baselines: only tasks of the miniature world have them, not {config.tasks}: baselines=false")


async def _play(config: EvalConfig, tasks: list[Task], url: str, folder: Path) -> dict[str, Any]:
    rollout = config.rollout
    async with ToolClient(url, timeout_s=rollout.call_timeout_s, retries=rollout.call_retries) as tools:
        if config.policy == "gold":
            from jorch.evals.tau2 import play_gold

            with stage("gold policy", len(tasks)) as progress:
                rows = await play_gold(tasks, tools, _CONCURRENCY)
                progress.advance(len(tasks))
            return {"gold": summarise(rows)}
        if config.endpoint is not None:
            return {"model": await _play_endpoint(config, config.endpoint, tasks, tools)}
        driver = make_driver(config, tools, folder)
        with closing(driver.sampler):
            results = {"model": await evaluate(driver, tasks, config.temperatures, config.seed, "model")}
        if config.baselines:
            results["baselines"] = await play_baselines(tasks, tools, config.seed)
        return results


async def _play_endpoint(
    config: EvalConfig, section: EndpointConfig, tasks: list[Task], tools: ToolClient
) -> dict[str, Any]:
    rollout = config.rollout
    async with ChatEndpoint(section, timeout_s=rollout.call_timeout_s, retries=rollout.call_retries) as endpoint:
        summaries = []
        for temperature in config.temperatures:
            with stage(f"{endpoint.model}, T = {temperature:g}"[:23], len(tasks)) as progress:
                rows = await play_chat(tasks, tools, endpoint, config, temperature, progress.advance)
            if not rows:
                raise ToolServerDown(f"tool server {tools.url} lost all sessions: it was restarted")
            summaries.append(summarise(rows))
    return _with_further(summaries, config.temperatures)


def make_driver(config: EvalConfig, tools: ToolClient, run_folder: Path) -> Driver:
    """A driver around the model that the config names, on all devices; its sampler is to be closed."""
    assert config.init_from is not None
    start = pretrained.load(config.init_from, make_mesh(config.mesh), **computation(config))
    sampler = make_sampler(config.sampler, config.rollout, start, run_folder)
    return Driver(sampler, tools, start.tokenizer, config.chat, config.rollout)


async def evaluate(
    driver: Driver, tasks: Sequence[Task], temperatures: Sequence[float], seed: int, name: str
) -> dict[str, Any]:
    """The summary at the first temperature, with those at further ones under "temperature_1" and the like."""
    summaries = [
        summarise(await play(driver, tasks, temperature, seed, f"{name}, T = {temperature:g}"))
        for temperature in temperatures
    ]
    return _with_further(summaries, temperatures)


def _with_further(summaries: Sequence[dict[str, Any]], temperatures: Sequence[float]) -> dict[str, Any]:
    further = zip(temperatures[1:], summaries[1:], strict=True)
    return summaries[0] | {f"temperature_{temperature:g}": summary for temperature, summary in further}


async def play(driver: Driver, tasks: Sequence[Task], temperature: float, seed: int, title: str) -> list[EvalRow]:
    """One trajectory per task; those that the infrastructure lost have no row."""
    rows: list[EvalRow] = []
    size = driver.sampler.config.max_rows
    with stage(title, len(tasks)) as progress:
        for start in range(0, len(tasks), size):
            part = tasks[start : start + size]
            groups = await driver.run_groups(part, 1, run_id=f"{title}-{start}", seed=seed, temperature=temperature)
            rows += [
                trajectory_row(task, trajectory)
                for task, (trajectory,) in zip(part, groups, strict=True)
                if not trajectory.lost
            ]
            lost = {"lost": start + len(part) - len(rows)} if len(rows) < start + len(part) else {}
            progress.advance(len(part), accuracy=sum(row.accuracy for row in rows) / len(rows), **lost)
    return rows


async def play_baselines(tasks: Sequence[Task], tools: ToolClient, seed: int) -> dict[str, Any]:
    """Every model-free policy of the miniature world on the same tasks."""
    results = {}
    with stage("baselines", len(baselines.POLICIES)) as progress:
        for policy in baselines.POLICIES:
            results[policy] = summarise(await baselines.play(policy, tasks, tools, seed, _CONCURRENCY))
            progress.advance()
    return results

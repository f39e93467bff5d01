"""`jorch quickstart`: the whole loop on the miniature world, from tasks to a report, in one process and a server.

Every stage leaves its result in the run folder before the next one starts, so an interrupted run goes on where it was.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

from jorch import config_io
from jorch.config import QuickstartConfig, RlConfig, SftConfig
from jorch.data.tasks import read_jsonl
from jorch.evals import harness, tables
from jorch.evals.report import read_summary, write_report
from jorch.export import pretrained
from jorch.metrics import stage
from jorch.rl import loop
from jorch.rollout.driver import Driver
from jorch.rollout.sampler import Sampler
from jorch.rollout.server_process import start_tool_server
from jorch.rollout.tool_client import ToolClient
from jorch.run_folder import atomic_write, naming, open_run_folder
from jorch.sections import ServerSection
from jorch.serving.samplers import make_sampler
from jorch.sharding import make_mesh
from jorch.synth import miniature, sft
from jorch.types import Task
from jorch.versions import versions

_TEMPERATURES = (0.0, 1.0)
_SPLITS = ("train", "validation", "heldout")


def run(config: QuickstartConfig, *, fresh: bool, from_scratch: bool) -> None:
    """Run or resume; ends with the table and the report's path. Raises ValueError for what a user can mend."""
    with open_run_folder(config, resume=not fresh, fresh=fresh) as folder:
        summary = Summary(folder / "summary.json", config)
        report = folder / "report.html"
        own_base = _has_own_base(folder)
        if from_scratch and not own_base and "base" in summary.values:
            raise ValueError(f"{folder} holds a run of the base that ships with jorch: pass --fresh as well")
        if "trained" in summary.values and report.is_file():
            print(f"{folder} holds this run, finished; --fresh runs it again")
        else:
            _work(config, folder, summary, own_base=own_base or from_scratch)
            write_report(folder)
        tables.print_results(summary.values)
        print(f"report: {report}")


def _work(config: QuickstartConfig, folder: Path, summary: "Summary", *, own_base: bool) -> None:
    """All stages, those that are done left out."""
    server_config = folder / "tools_server.yaml"
    atomic_write(server_config, yaml.safe_dump({"experts": miniature.catalogue(), "seed": config.seed}))
    tasks = {split: _synthesise(config, folder, split, summary) for split in _SPLITS}
    init_from = _rebuild_base(config, folder, summary) if own_base else "base"
    start = pretrained.load(init_from, make_mesh(config.rl.mesh))
    with start_tool_server(server_config, folder / "tools_server.log") as url:
        print(f"{'tool server':<24}{url}  {len(miniature.catalogue())} simulated experts", flush=True)
        rl = _rl_config(config, folder, init_from, url)
        with closing(make_sampler(rl.sampler, rl.rollout, start, folder, rl.lora)) as sampler:
            _run_stages(rl, folder, tasks, start, sampler, url, summary)


class Summary:
    """summary.json, rewritten after every stage; what it holds is not done again."""

    def __init__(self, path: Path, config: QuickstartConfig) -> None:
        self._path = path
        self.values: dict[str, Any] = read_summary(path) if path.is_file() else {}
        self.values |= {
            "seed": config.seed,
            "versions": versions(),
            "settings": {"heldout_tasks": config.miniature.num_heldout, "rl_steps": config.rl.steps},
        }
        self.values.setdefault("wall_s", {})

    def result(self, name: str, measure: Callable[[], Any]) -> None:
        """Store what `measure` returns under `name`, unless an earlier run of this folder has."""
        if name not in self.values:
            with self.timed(name):
                self.values[name] = measure()
            self._write()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to `wall_s`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = self.values["wall_s"].get(name, 0.0) + time.perf_counter() - began
            self.values["wall_s"][name] = round(spent, 2)
            self._write()

    def _write(self) -> None:
        atomic_write(self._path, json.dumps(self.values, indent=1) + "\n")


def _run_stages(
    rl: RlConfig,
    folder: Path,
    tasks: dict[str, list[Task]],
    start: pretrained.Pretrained,
    sampler: Sampler,
    url: str,
    summary: Summary,
) -> None:
    heldout = tasks["heldout"]

    def evaluate(name: str) -> Callable[[], Any]:
        return lambda: asyncio.run(_evaluate(rl, heldout, start, sampler, url, name))

    summary.result("base", evaluate("base"))
    summary.result("baselines", lambda: asyncio.run(_baselines(rl, heldout, url)))
    if "trained" not in summary.values:
        with summary.timed("reinforcement learning"):
            learner = loop.make_learner(rl, make_mesh(rl.mesh), start)
            loop.train(rl, folder, tasks["train"], start, learner, sampler, url)
    summary.result("trained", evaluate("trained"))


async def _evaluate(
    rl: RlConfig,
    tasks: list[Task],
    start: pretrained.Pretrained,
    sampler: Sampler,
    url: str,
    name: str,
) -> dict[str, Any]:
    async with ToolClient(url, timeout_s=rl.rollout.call_timeout_s, retries=rl.rollout.call_retries) as tools:
        driver = Driver(sampler, tools, start.tokenizer, rl.chat, rl.rollout)
        return await harness.evaluate(driver, tasks, _TEMPERATURES, rl.seed, f"evaluate {name}")


async def _baselines(rl: RlConfig, tasks: list[Task], url: str) -> dict[str, Any]:
    async with ToolClient(url, timeout_s=rl.rollout.call_timeout_s, retries=rl.rollout.call_retries) as tools:
        return await harness.play_baselines(tasks, tools, rl.seed)


def _synthesise(config: QuickstartConfig, folder: Path, split: str, summary: Summary) -> list[Task]:
    """The tasks of a split, written once and read back as training reads any task file."""
    path = folder / "tasks" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    if not path.is_file():
        with summary.timed("tasks"), stage(f"tasks: {split}") as progress, naming(path):
            partial = path.with_suffix(".partial")
            progress.advance(miniature.write_jsonl(partial, miniature.tasks(config.miniature, split, config.seed)))
            partial.rename(path)
    return read_jsonl(path)


def _has_own_base(folder: Path) -> bool:
    return (folder / "base" / "config.yaml").is_file()


def _rebuild_base(config: QuickstartConfig, folder: Path, summary: Summary) -> str:
    """Train the base by its recipe into the run folder; what an interrupted run left is continued."""
    out = f"out={json.dumps(str(folder / 'base'))}"
    recipe = config_io.load(config_io.configs_dir() / config.base, SftConfig, [out])
    model = folder / "base" / "model"
    if not model.is_dir():
        with summary.timed("base"):
            sft.run(recipe, resume=True, fresh=False)
    return str(model)


def _rl_config(config: QuickstartConfig, folder: Path, init_from: str, url: str) -> RlConfig:
    return config.rl.model_copy(
        update={
            "out": str(folder),
            "seed": config.seed,
            "init_from": init_from,
            "tasks": str(folder / "tasks" / "train.jsonl"),
            "tools_server": ServerSection(url=url),
        }
    )

"""`jorch bench serving`: exports, weight pushes, the rollout client and asynchronous training, each beside its target.

Real parts only: vLLM in its own environment ($JORCH_VLLM), the tool server in its own process. Parts can be chosen.
"""

import asyncio
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from jorch import config_io
from jorch.config import QuickstartConfig, RlConfig
from jorch.data.tokenizer import Tokenizer
from jorch.evals import harness
from jorch.export import hf, pretrained
from jorch.export.adapter import Adapter
from jorch.export.probe import make_probe_fn
from jorch.metrics import stage
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3
from jorch.plan.job import PUBLISHED
from jorch.rl import loop
from jorch.rollout.driver import Driver
from jorch.rollout.sampler import Sampler
from jorch.rollout.server_process import start_tool_server
from jorch.rollout.tool_client import ToolClient
from jorch.rollout.vllm_sampler import GENERATE_PATH, VllmSampler
from jorch.run_folder import atomic_write, open_run_folder
from jorch.sections import LoraConfig, MeshConfig, MiniatureConfig, SamplerConfig, VllmConfig
from jorch.serving.samplers import Weights, make_sampler
from jorch.serving.vllm import ServeOptions, vllm_server
from jorch.sharding import make_mesh
from jorch.synth import miniature
from jorch.types import CompletionRequest, Task
from jorch.versions import versions

_NUM_PUSHES, _NUM_ROUNDS = 7, 9
_CONCURRENT, _PROMPT_TOKENS, _NEW_TOKENS = 64, 48, 32
_MEAN_LATENCY_S, _LAG = 1.0, 2
NUM_STEPS, NUM_HELDOUT = 160, 1024


class Figure(NamedTuple):
    """One line of the table; all of `values` are measured alike."""

    name: str
    values: tuple[float, ...]
    target: float | None = None
    at_most: bool = True

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.median <= self.target if self.at_most else self.median >= self.target


def run(
    json_path: Path | None,
    parts: Collection[str],
    num_steps: int = NUM_STEPS,
    size: str = "Qwen3-0.6B",
) -> None:
    """Measure `parts` (export, push, client, async), print the table, and write the same numbers to `json_path`.

    Raises ValueError where vLLM is needed and not found.
    """
    measured: list[Figure] = []
    with _memory_folder() as folder:
        if "export" in parts:
            measured += _export(folder, size)
        if "push" in parts:
            measured += _push(folder, "base")
            measured += _push(folder, size)
            measured += _push(folder, size, LoraConfig(rank=16))
        if "client" in parts:
            measured += _client(folder)
    if "async" in parts:
        measured += _asynchronous(num_steps)
    where = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {datetime.date.today()}"
    _print(measured, where)
    if json_path is not None:
        figures = [figure._asdict() | {"median": figure.median, "met": figure.met} for figure in measured]
        content = {"device": where, "versions": versions(), "figures": figures}
        atomic_write(json_path, json.dumps(content, indent=1) + "\n")


@contextmanager
def _memory_folder() -> Iterator[Path]:
    """In a file system in memory where there is one: what is measured is jorch and vLLM, not a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def _start(size: str) -> pretrained.Pretrained:
    """The base, or random weights of a published size in bfloat16, as they are served."""
    mesh = make_mesh(MeshConfig())
    base = pretrained.load("base", mesh)
    if size == "base":
        return base
    model = Qwen3(PUBLISHED[size].model_copy(update={"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}))
    return pretrained.Pretrained(model, model.init(jax.random.key(0), mesh), base.tokenizer)


def _export(folder: Path, size: str) -> list[Figure]:
    start = _start(size)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(start.params))
    rates = []
    for _ in range(_NUM_PUSHES):
        began = time.perf_counter()
        hf.save(folder / "export", start.model.config, start.params, start.tokenizer)
        rates.append(num_bytes / (time.perf_counter() - began) / 1e9)
    shutil.rmtree(folder / "export")
    return [Figure(f"export of {size} into memory, GB/s", tuple(rates), 0.5, at_most=False)]


def _push(folder: Path, size: str, lora: LoraConfig | None = None) -> list[Figure]:
    """Pushes as training does them, of a model or of an adapter: an export with its probe, then pause, reload, resume
    and the probe's check.
    """
    start = _start(size)
    dtype = start.model.config.param_dtype
    config = SamplerConfig(max_context_tokens=512, vllm=VllmConfig(dtype=dtype))
    weights = Weights(start.without_params(), folder / "weights", config)
    base = weights.write_base(start.params)
    options = ServeOptions(base, dtype=dtype, max_context_tokens=512, rl=True, lora_rank=lora and lora.rank)
    publish = (lambda: start.params) if lora is None else _adapters(start, lora)
    what = size if lora is None else f"an adapter (rank {lora.rank}) of {size}"
    writes, pushes = [], []
    with vllm_server(options, folder / "vllm.log") as url, stage(f"pushes of {what}", _NUM_PUSHES) as progress:
        for version in range(1, _NUM_PUSHES + 1):
            began = time.perf_counter()
            target = weights.write(publish(), version)
            written = time.perf_counter()
            problems = weights.push(target, version, [url])
            pushes.append(time.perf_counter() - written)
            writes.append(written - began)
            assert not problems, problems
            progress.advance()
    shutil.rmtree(folder / "weights")
    target_s = None if lora else 0.5 if size == "base" else 5.0
    return [
        Figure(f"export of {what} with its probe, s", tuple(writes)),
        Figure(f"push of {what} to one server, s", tuple(pushes), target_s),
    ]


def _adapters(start: pretrained.Pretrained, lora: LoraConfig) -> Callable[[], Adapter]:
    """Gives one that is drawn at random, with its probe, as a learner would."""
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    shapes = LoraQwen3(start.model, lora).abstract_params()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.01, x.shape), x.dtype), shapes)
    probe_fn = make_probe_fn(start.model.config, lora, mesh)
    probe_fn(params, start.params)  # compiles
    return lambda: Adapter(params, lora, probe_fn(params, start.params))


def _client(folder: Path) -> list[Figure]:
    """The sampler beside a bare HTTP client: the same requests, by turns, to one server."""
    base = _start("base")
    # Random weights rarely end a completion: every request has the same work.
    start = replace(base, params=base.model.init(jax.random.key(1), make_mesh(MeshConfig())))
    config = SamplerConfig(max_context_tokens=256, max_rows=_CONCURRENT, vllm=VllmConfig())
    weights = Weights(start.without_params(), folder / "weights", config)
    first = weights.write(start.params, 0)
    options = ServeOptions(first, max_context_tokens=256, max_rows=_CONCURRENT, rl=True)
    with vllm_server(options, folder / "vllm.log") as url:
        ours, bare = asyncio.run(_by_turns(config, url, start.tokenizer))
    lost = tuple(100 * (1 - mine / theirs) for mine, theirs in zip(ours, bare, strict=True))
    return [
        Figure(f"sampler, {_CONCURRENT} requests at once, tokens/s", tuple(ours)),
        Figure("bare client, same requests, tokens/s", tuple(bare)),
        Figure("throughput that the sampler costs, %", lost, 5.0),
    ]


async def _by_turns(config: SamplerConfig, url: str, tokenizer: Tokenizer) -> tuple[list[float], list[float]]:
    def unused(*_: Any) -> Any:
        raise AssertionError("nothing is pushed here")

    sampler = VllmSampler(config, [url], tokenizer.vocab_size - 1, unused, unused)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, tokenizer.vocab_size - 1, (_CONCURRENT, _PROMPT_TOKENS)).astype(np.int32)

    async def ours(request: CompletionRequest) -> int:
        return len((await sampler.complete(request)).token_ids)

    async def bare(request: CompletionRequest) -> int:
        async with http.post(url + GENERATE_PATH, json=sampler.body(request, [], _NEW_TOKENS)) as response:
            return len((await response.json())["choices"][0]["token_ids"])

    async def rate(number: int, ask: Callable[[CompletionRequest], Awaitable[int]]) -> float:
        requests = [
            CompletionRequest(f"{number}/{row}", prompt, _NEW_TOKENS, 1.0, 1000 * number + row)
            for row, prompt in enumerate(prompts)
        ]
        began = time.perf_counter()
        num_tokens = sum(await asyncio.gather(*map(ask, requests)))
        return num_tokens / (time.perf_counter() - began)

    found: tuple[list[float], list[float]] = ([], [])
    async with sampler.connected(), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await rate(-1, ours)
        await rate(-2, bare)
        with stage("sampler and bare client", _NUM_ROUNDS) as progress:
            for number in range(_NUM_ROUNDS):
                # Who goes second may profit from the first; so they change places.
                for which in (0, 1) if number % 2 else (1, 0):
                    found[which].append(await rate(number, (ours, bare)[which]))
                progress.advance()
    return found


def _asynchronous(num_steps: int) -> list[Figure]:
    """The quickstart's training twice, on tools that take a second: rollouts in turns with updates, and beside them."""
    steps_per_s, utilities = zip(*(_train(lag, num_steps) for lag in (0, _LAG)), strict=True)
    about = f"tools of {_MEAN_LATENCY_S:g} s"
    return [
        Figure(f"synchronous training, {about}, steps/s", steps_per_s[:1]),
        Figure(f"asynchronous training, {about}, steps/s", steps_per_s[1:]),
        Figure("asynchronous / synchronous", (steps_per_s[1] / steps_per_s[0],), 1.5, at_most=False),
        Figure("utility after synchronous training", utilities[:1]),
        Figure("utility after asynchronous training", utilities[1:]),
    ]


def _train(max_policy_lag: int, num_steps: int) -> tuple[float, float]:
    """(steps per second after the first step, which compiles; mean utility on held-out tasks, greedy)."""
    quickstart = config_io.load(config_io.configs_dir() / "quickstart.yaml", QuickstartConfig)
    train, heldout = (
        list(miniature.tasks(MiniatureConfig(num_heldout=NUM_HELDOUT), split, quickstart.seed))
        for split in ("train", "heldout")
    )
    start = pretrained.load("base", make_mesh(MeshConfig()))
    with tempfile.TemporaryDirectory() as scratch:
        config = _rl_config(quickstart.rl, Path(scratch), max_policy_lag, num_steps)
        with open_run_folder(config, resume=False, fresh=True) as folder:
            with closing(make_sampler(config.sampler, config.rollout, start, folder)) as sampler:
                learner = loop.make_learner(config, make_mesh(config.mesh), start)
                with _tool_server(Path(scratch), time_scale=_MEAN_LATENCY_S / _mean_latency_s()) as url:
                    loop.train(config, folder, train, start, learner, sampler, url)
                with _tool_server(Path(scratch), time_scale=0.0) as url:
                    summary = asyncio.run(_evaluate(config, heldout, start, sampler, url))
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["time/step_s"] for row in rows if "time/step_s" in row][1:]
    return len(seconds) / sum(seconds), summary["utility"]["mean"]


def _rl_config(rl: RlConfig, scratch: Path, max_policy_lag: int, num_steps: int) -> RlConfig:
    """The quickstart's, with the correction that old weights need, in both runs."""
    changes = {
        "out": str(scratch / "run"),
        "steps": num_steps,
        "max_policy_lag": max_policy_lag,
        "algorithm": rl.algorithm.model_copy(update={"importance_cap": 2.0}),
        "checkpoint": rl.checkpoint.model_copy(update={"every_steps": num_steps}),
    }
    return rl.model_copy(update=changes)


def _mean_latency_s() -> float:
    return float(np.mean([entry["latency_s"] for entry in miniature.catalogue().values()]))


@contextmanager
def _tool_server(scratch: Path, time_scale: float) -> Iterator[str]:
    """Its experts really take `time_scale` seconds for each second that they bill."""
    path = scratch / "tools_server.yaml"
    atomic_write(path, yaml.safe_dump({"experts": miniature.catalogue(), "time_scale": time_scale}))
    with start_tool_server(path, scratch / "tools_server.log") as url:
        yield url


async def _evaluate(
    config: RlConfig, tasks: list[Task], start: pretrained.Pretrained, sampler: Sampler, url: str
) -> dict[str, Any]:
    async with ToolClient(url, timeout_s=30, retries=3) as tools:
        driver = Driver(sampler, tools, start.tokenizer, config.chat, config.rollout)
        return await harness.evaluate(driver, tasks, (0.0,), config.seed, "evaluate")


def _print(measured: Sequence[Figure], where: str) -> None:
    table = Table(caption=f"medians of what follows them; {where}", caption_justify="left")
    for title in ("", "median", "quartiles", "n", "target", ""):
        table.add_column(title, justify="left" if not title else "right")
    for figure in measured:
        low, high = np.percentile(figure.values, (25, 75))
        sign = "<=" if figure.at_most else ">="
        target = "" if figure.target is None else f"{sign} {figure.target:g}"
        verdict = {None: "", True: "met", False: "missed"}[figure.met]
        spread = f"{low:,.3g} to {high:,.3g}" if len(figure.values) > 1 else ""
        table.add_row(figure.name, f"{figure.median:,.3g}", spread, str(len(figure.values)), target, verdict)
    Console(width=None if sys.stdout.isatty() else 110).print(table)

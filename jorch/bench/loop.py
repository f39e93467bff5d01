"""`jorch bench loop`: where the time of an RL step goes, and the sampler beside Hugging Face transformers.

Real parts only: the quickstart's model and settings with 128 concurrent trajectories, the tool server in its own
process. Medians over steps after the first, which compiles.
"""

import asyncio
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from jorch import config_io
from jorch.config import QuickstartConfig, RlConfig
from jorch.data.tasks import TaskStream
from jorch.export import hf, pretrained
from jorch.metrics import stage
from jorch.rl import loop
from jorch.rollout.driver import Driver
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.sampler import Sampler
from jorch.rollout.server_process import start_tool_server
from jorch.rollout.tool_client import ToolClient
from jorch.run_folder import atomic_write
from jorch.sections import MiniatureConfig
from jorch.serving.samplers import make_sampler
from jorch.sharding import make_mesh
from jorch.synth import miniature
from jorch.types import CompletionRequest
from jorch.versions import versions

_TASKS, _GROUP = 16, 8
_NEW_TOKENS, _PROMPT_TOKENS, _REPEATS = 32, 48, 15
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
HF_PYTHON_VARIABLE = "JORCH_HF_PYTHON"
"""An interpreter with torch and transformers, where this one has none."""

_TRANSFORMERS = """
import json, statistics, sys, time, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
new, repeats = map(int, sys.argv[2:])
ids = torch.tensor(json.load(sys.stdin))
batch, prompt = ids.shape
def run():
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                             min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    assert out.shape == (batch, prompt + new)
    return batch * new / (time.perf_counter() - began)
run()
print(json.dumps({"tokens_per_s": [run() for _ in range(repeats)], "transformers": transformers.__version__,
                  "torch": torch.__version__, "threads": torch.get_num_threads()}))
"""


def run(json_path: Path | None, num_steps: int = 20) -> None:
    """Measure, print the table, and write the same numbers to `json_path`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps, programs = _measure_steps(folder, num_steps)
        prompts = np.random.default_rng(0).integers(3, 300, (_TASKS, _PROMPT_TOKENS)).repeat(_GROUP, axis=0)
        ours = _sampler_tokens_per_s(folder / "random", prompts.astype(np.int32))
        theirs = _transformers_tokens_per_s(folder / "random", prompts)
    measured = _summarise(steps, programs, ours, theirs)
    _print(measured)
    if json_path is not None:
        atomic_write(json_path, json.dumps(measured, indent=1) + "\n")


def _measure_steps(folder: Path, num_steps: int) -> tuple[list[dict[str, float]], list[int]]:
    """Metrics of each step, and how many programs had been compiled after it."""
    server_config = folder / "tools_server.yaml"
    atomic_write(server_config, yaml.safe_dump({"experts": miniature.catalogue()}))
    config = _config()
    tasks = list(miniature.tasks(MiniatureConfig(num_train=1024), "train", config.seed))
    start = pretrained.load("base", make_mesh(config.mesh))
    learner = loop.make_learner(config, make_mesh(config.mesh), start)

    async def run(url: str, sampler: Sampler) -> tuple[list[dict[str, float]], list[int]]:
        steps, programs = [], []
        stream = TaskStream(tasks, config.tasks_per_step, config.seed)
        async with ToolClient(url, timeout_s=30, retries=3) as tools:
            driver = Driver(sampler, tools, start.tokenizer, config.chat, config.rollout)
            # As the loop does: weights from a train step are placed otherwise than freshly read ones.
            sampler.publish(learner.params, 0)
            sampler.warm_up(append_tokens=3)
            with _compilations() as compiled, stage("RL steps", num_steps) as progress:
                for step in range(num_steps):
                    metrics, _ = await loop.take_step(config, step, stream.batch(step), driver, sampler, learner)
                    steps.append(metrics)
                    programs.append(len(compiled))
                    progress.advance(step_s=metrics["time/step_s"])
        return steps, programs

    with start_tool_server(server_config, folder / "server.log") as url:
        with closing(make_sampler(config.sampler, config.rollout, start, folder)) as sampler:
            return asyncio.run(run(url, sampler))


def _config() -> RlConfig:
    rl = config_io.load(config_io.configs_dir() / "quickstart.yaml", QuickstartConfig).rl
    sampler = rl.sampler.model_copy(update={"max_rows": _TASKS * _GROUP})
    return rl.model_copy(update={"tasks_per_step": _TASKS, "group_size": _GROUP, "sampler": sampler})


@contextmanager
def _compilations() -> Iterator[list[float]]:
    """Collects the duration of every program that XLA compiles inside the block."""
    durations: list[float] = []
    active = True

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if active and event == _COMPILE_EVENT:
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        active = False  # jax has no public way to take a listener off again


def _sampler_tokens_per_s(folder: Path, prompts: np.ndarray) -> list[float]:
    """Our sampler on random weights, which are left in `folder`: one turn of 32 tokens after each of `prompts`."""
    config = _config()
    start = pretrained.load("base", make_mesh(config.mesh))
    params = start.model.init(jax.random.key(1), make_mesh(config.mesh))
    hf.save(folder, start.model.config, params, start.tokenizer)
    batch = len(prompts)
    sizes = {"max_context_tokens": _PROMPT_TOKENS + _NEW_TOKENS, "prefill_chunk_tokens": _PROMPT_TOKENS}
    shape = config.sampler.model_copy(update=sizes)
    sampler = JaxSampler(start.model, params, shape, max_tokens=_NEW_TOKENS, stop_id=-1)

    async def once(number: int) -> float:
        names = [f"{number}/{row}" for row in range(batch)]
        sampler.expect(names)
        began = time.perf_counter()
        await asyncio.gather(
            *(
                sampler.complete(CompletionRequest(name, prompt, _NEW_TOKENS, 1.0, row))
                for row, (name, prompt) in enumerate(zip(names, prompts, strict=True))
            )
        )
        rate = batch * _NEW_TOKENS / (time.perf_counter() - began)
        for name in names:
            sampler.release(name)
        return rate

    async def run() -> list[float]:
        await once(0)
        return [await once(number) for number in range(1, _REPEATS + 1)]

    with closing(sampler):
        return asyncio.run(run())


def _transformers_tokens_per_s(folder: Path, prompts: np.ndarray) -> dict[str, Any] | None:
    """transformers' generate on the weights in `folder`, same prompts; None where it is not installed."""
    python = os.environ.get(HF_PYTHON_VARIABLE, sys.executable)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", _TRANSFORMERS, str(folder), str(_NEW_TOKENS), str(_REPEATS)]
    prompts_json = json.dumps(prompts.tolist())
    done = subprocess.run(command, input=prompts_json, capture_output=True, text=True, env=environment, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _summarise(
    steps: list[dict[str, float]], programs: list[int], ours: list[float], theirs: dict[str, Any] | None
) -> dict[str, Any]:
    # The learner's work shrinks while groups fall silent; the steps that follow the first one are alike enough.
    later = steps[1:]
    shares = {
        part: [100 * s[f"time/{part}_s"] / s["time/step_s"] for s in later]
        for part in ("sample", "tools", "pack", "learn")
    }
    measured: dict[str, Any] = {
        "step, s": [s["time/step_s"] for s in later],
        "sampler, tokens/s": [s["rollout/sampled_tokens"] / s["time/sample_s"] for s in later],
        "learner, trained tokens/s": [s["train/loss_tokens"] / s["time/learn_s"] for s in later if "train/loss" in s],
        "share of sampling, %": shares["sample"],
        "share of tool server and driver, %": shares["tools"],
        "share of rewards and packing, %": shares["pack"],
        "share of learning, %": shares["learn"],
        "our sampler on random weights, tokens/s": ours,
    }
    if theirs is not None:
        measured["transformers generate, same weights, tokens/s"] = theirs["tokens_per_s"]
        measured["ratio"] = [float(np.median(ours) / np.median(theirs["tokens_per_s"]))]
    return {
        "medians": {name: _quartiles(values) for name, values in measured.items()},
        "programs_compiled_after_first_step": programs[-1] - programs[0],
        "steps": len(later),
        "trajectories": _TASKS * _GROUP,
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "versions": versions() | {k: theirs[k] for k in ("torch", "transformers")} if theirs else versions(),
        "date": datetime.date.today().isoformat(),
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q25": float(low), "q75": float(high)}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print(measured: dict[str, Any]) -> None:
    table = Table(
        caption=f"{measured['hardware']}, {measured['date']}, {measured['steps']} steps", caption_justify="left"
    )
    table.add_column(f"{measured['trajectories']} trajectories")
    for title in ("median", "quartiles"):
        table.add_column(title, justify="right")
    for name, values in measured["medians"].items():
        table.add_row(name, f"{values['median']:,.3g}", f"{values['q25']:,.3g} to {values['q75']:,.3g}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    if "ratio" not in measured["medians"]:
        print(f"transformers is not installed here; set {HF_PYTHON_VARIABLE} to an interpreter that has it")
    recompiled = measured["programs_compiled_after_first_step"]
    print(f"programs compiled after the first step: {recompiled}")
    assert recompiled == 0, "a step after the first one met a new shape"

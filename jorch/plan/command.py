"""`jorch plan`: the table, the verdict, and what would make a config fit."""

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from jorch.config import RlConfig, SftConfig
from jorch.flops import train_flops
from jorch.plan import changes, topology
from jorch.plan.job import Job, job_of
from jorch.plan.memory import Attention, memory
from jorch.plan.topology import GIB, Topology

HEADROOM = 0.1
"""Of the memory, left free: BUILD.md shows by how much the estimates err."""


def run(
    config: SftConfig | RlConfig, topology_name: str, *, attention: Attention, with_compile: bool, as_json: bool
) -> None:
    """Print the plan. Raises ValueError where the config does not fit, with the cheapest changes."""
    where, job = topology.parse(topology_name), job_of(config)
    plan = make_plan(job, where, attention)
    if with_compile and where.platform != "cpu" and plan["fits"]:
        plan |= _compiled(job, where, plan["usable_bytes_per_device"], plan["bytes_per_device"]["reference"])
    print(json.dumps(plan)) if as_json else _print(plan)
    if not plan["fits"]:
        raise ValueError(_refusal(plan))


def make_plan(job: Job, where: Topology, attention: Attention) -> dict[str, Any]:
    """The analytical part: plain numbers, bytes and FLOPs, as `--json` prints them."""
    limit_bytes = (1 - HEADROOM) * where.memory_bytes
    needed = memory(job, where.num_devices, attention)
    T = job.batch.row_tokens
    fits = needed.total <= limit_bytes
    return {
        "topology": where.name,
        "devices": where.num_devices,
        "attention": attention,
        "bytes_per_device": asdict(needed) | {"total": needed.total},
        "memory_bytes_per_device": where.memory_bytes,
        "usable_bytes_per_device": limit_bytes,
        "flops_per_token": train_flops(job.model, 1, (T + 1) / 2, job.lora),
        "flops_per_token_dense_equivalent": train_flops(job.model, 1, T, job.lora),
        "tokens_per_step_at_most": job.num_micro * job.batch.micro_rows * T,
        "fits": fits,
        "micro_rows": job.batch.micro_rows,
        "largest_micro_rows": changes.largest_batch(job, where.num_devices, limit_bytes, attention),
        "changes_that_fit": []
        if fits
        else [
            {
                "overrides": [written for change in made for written in change.overrides(job)],
                "total_bytes_per_device": after.total,
            }
            for made, after in changes.cheapest(job, where.num_devices, limit_bytes, attention)
        ],
        "compiled": None,
    }


def _compiled(job: Job, where: Topology, usable_bytes: float, reference_bytes: float) -> dict[str, Any]:
    """XLA's own figures, and the verdict by them. The reference policy lies beside the step, which does not read it."""
    from jorch.plan import compile as ahead_of_time

    missing = ahead_of_time.missing_compiler(where)
    if missing:
        print(
            f"not compiled: {missing} is missing (extra `{where.platform}`); the figures are analytical",
            file=sys.stderr,
        )
        return {}
    step = ahead_of_time.compile_step(job, where, usable_bytes - reference_bytes)
    compiled = replace(step, peak=step.peak + reference_bytes)
    fits = step.fits and (reference_bytes == 0 or compiled.peak <= usable_bytes)
    return {"compiled": asdict(replace(compiled, fits=fits)), "fits": fits}


def _refusal(plan: dict[str, Any]) -> str:
    total = (plan["compiled"] or {}).get("peak") or plan["bytes_per_device"]["total"]
    head = (
        f"does not fit {plan['topology']}: {total / GIB:.1f} GiB of "
        f"{plan['usable_bytes_per_device'] / GIB:.1f} GiB usable per device"
    )
    fitting = [
        f"{' '.join(change['overrides'])} ({change['total_bytes_per_device'] / GIB:.1f} GiB)"
        for change in plan["changes_that_fit"]
    ]
    return f"{head}; would fit: {'; '.join(fitting)}" if fitting else f"{head}; take more or larger devices"


def _print(plan: dict[str, Any]) -> None:
    table = Table(caption_justify="left", caption=_caption(plan))
    table.add_column(f"per device, {plan['devices']} devices of {plan['topology']}")
    table.add_column("GiB", justify="right")
    for name, value in plan["bytes_per_device"].items():
        shown = "total: the above, but of the last two the larger" if name == "total" else name.replace("_", " ")
        table.add_row(shown, f"{value / GIB:,.2f}", end_section=name == "logits")
    if plan["compiled"]:
        table.add_row("XLA's own peak, compiled ahead of time", f"{plan['compiled']['peak'] / GIB:,.2f}")
    table.add_row("usable", f"{plan['usable_bytes_per_device'] / GIB:,.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"FLOPs per token: {plan['flops_per_token']:.3g} (causal), ", end="")
    print(f"{plan['flops_per_token_dense_equivalent']:.3g} (dense equivalent)")
    print(f"tokens per step: at most {plan['tokens_per_step_at_most']:,}")
    verdict = "fits" if plan["fits"] else "does not fit"
    print(f"verdict: {verdict}; batch.micro_rows={plan['micro_rows']}, largest that fits {plan['largest_micro_rows']}")


def _caption(plan: dict[str, Any]) -> str:
    source = "analytical, beside XLA's own" if plan["compiled"] else "analytical, not compiled"
    return f"{source}; {plan['attention']} attention; the trainer alone, no sampler"

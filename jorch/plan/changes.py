"""What would make a job fit: single changes of the config and pairs of them, the cheapest first."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jorch.plan.job import Job
from jorch.plan.memory import Attention, Memory, memory
from jorch.sections import LoraConfig, Section


class Change(NamedTuple):
    """An override and what it costs, in arbitrary units: only the order matters."""

    key: str
    value: Any
    cost: float

    def overrides(self, job: Job) -> list[str]:
        """As it is written on the command line, with what has to change along."""
        if self.key == "lora":
            return ["lora={}"]
        written = [f"{self.key.replace('model.', job.model_prefix)}={self.value}"]
        if self.key == "batch.row_tokens" and job.within_row:
            context = job.within_row[0][1]
            if context > self.value:
                written += [f"{key}={length * self.value // context}" for key, length in job.within_row]
        return written


def largest_batch(job: Job, num_devices: int, limit_bytes: float, attention: Attention) -> int:
    """The largest batch.micro_rows that fits, a multiple of data x fsdp; 0 where not even one row a device does."""
    fixed = job.mesh.context * job.mesh.tensor
    per_row = num_devices // fixed

    def fits(factor: int) -> bool:
        sized = _with(job, Change("batch.micro_rows", factor * per_row, 0.0))
        return memory(sized, num_devices, attention).total <= limit_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * per_row


def cheapest(
    job: Job, num_devices: int, limit_bytes: float, attention: Attention, count: int = 3
) -> list[tuple[tuple[Change, ...], Memory]]:
    """Up to `count` sets of changes under which the job fits, none of which holds another one."""
    options = list(_options(job, num_devices))
    sets = [
        *((change,) for change in options),
        *itertools.combinations(options, 2),
        *itertools.combinations(options, 3),
    ]
    sets = [changes for changes in sets if len({change.key for change in changes}) == len(changes)]
    found: list[tuple[tuple[Change, ...], Memory]] = []
    for changes in sorted(sets, key=lambda changes: sum(change.cost for change in changes)):
        if any(set(smaller) <= set(changes) for smaller, _ in found):
            continue
        changed = job
        for change in changes:
            changed = _with(changed, change)
        try:
            needed = memory(changed, num_devices, attention)
        except ValueError:  # does not divide over this mesh
            continue
        if needed.total <= limit_bytes:
            found.append((changes, needed))
        if len(found) == count:
            break
    return found


def _options(job: Job, num_devices: int) -> Iterator[Change]:
    """Of the mesh one axis changes at a time; `mesh.fsdp` then takes what is left, so that data stays 1."""
    rows = job.batch.micro_rows
    for factor in (2, 4, 8, 16):
        if rows % factor == 0:
            yield Change("batch.micro_rows", rows // factor, 0.5 + 0.1 * factor)  # more micro-batches, same result
    if job.model.remat == "none":
        yield Change("model.remat", "save_attention", 1.4)  # a third more arithmetic, without attention's
        yield Change("model.remat", "full", 1.5)  # a third more arithmetic
    if job.model.remat != "offload":
        yield Change("model.remat", "offload", 3.0)  # and the layers' inputs travel to the host and back
    for size in (1, 2, 4, 8, 16):
        if size != job.mesh.fsdp and num_devices % size == 0:
            yield Change("mesh.fsdp", size, 1.0 + 0.1 * size)
        if size > job.mesh.context:
            yield Change("mesh.context", size, 1.6 + 0.1 * size)
        if size > job.mesh.tensor:
            yield Change("mesh.tensor", size, 1.8 + 0.2 * size)
    if job.optimizer.kind == "adam":
        if job.optimizer.moment_dtype == "float32":
            yield Change("optimizer.moment_dtype", "bfloat16", 2.5)  # first moments of 8 bits
        yield Change("optimizer.kind", "adafactor", 4.0)  # another optimizer: its rate wants tuning
    if job.may_adapt and job.lora is None:
        yield Change("lora", LoraConfig(), 5.0)  # less is trained
    for factor in (2, 4, 8):
        yield Change("batch.row_tokens", job.batch.row_tokens // factor, 4.0 + factor)  # long samples are lost
    if job.model.param_dtype == "float32":
        yield Change("model.param_dtype", "bfloat16", 8.0)  # small updates round away


def _with(job: Job, change: Change) -> Job:
    if change.key == "lora":
        return replace(job, lora=change.value)
    section, key = change.key.split(".")
    part: Section = getattr(job, section)
    changed = replace(job, **{section: part.model_copy(update={key: change.value})})
    if change.key == "batch.micro_rows":
        rows = job.num_micro * job.batch.micro_rows
        return replace(changed, num_micro=max(-(-rows // change.value), 1))
    return changed

"""Samples -> one PackedBatch of fixed shape: where host records become the input of a train step. Pure numpy.

A sample is its *prompt* (all tokens before the first trained one) and its *tail*. The samples with an
identical prompt are a *family*; members that land in one row share one copy of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jorch.types import PackedBatch, Sample
from kernels.attention.mask import tree_ends


class Member(NamedTuple):
    """A sample of a family with its lengths, counted once."""

    sample: Sample
    prompt_tokens: int
    tail_tokens: int


Family = list[Member]


def pack(samples: Sequence[Sample], *, row_tokens: int, micro_rows: int, num_micro: int) -> PackedBatch:
    """A PackedBatch of numpy arrays [num_micro, micro_rows, row_tokens]; its docstring shows a row.

    Rows fill micro-batches from the first on, so unused ones lie at the end. The same samples in the same
    order always give the same batch. Raises ValueError where a sample is longer than a row.
    """
    rows = _plan_rows([_member(sample, row_tokens) for sample in samples], row_tokens)
    num_rows = num_micro * micro_rows
    assert len(rows) <= num_rows, f"{len(rows)} rows needed, the batch has {num_rows}"
    ints, floats = (np.zeros((5, num_rows, row_tokens), dtype) for dtype in (np.int32, np.float32))
    batch = PackedBatch(*ints, *floats)
    batch.parents[:] = -1
    for index, families in enumerate(rows):
        row = PackedBatch(*(field[index] for field in batch))
        start, segment_id = 0, 1
        for family in families:
            start = _write(row, family, start, segment_id)
            segment_id += 1 + len(family)
    batch.old_logprobs[:] = batch.sampler_logprobs
    return PackedBatch(*(field.reshape(num_micro, micro_rows, row_tokens) for field in batch))


def fill_fraction(batch: PackedBatch) -> float:
    """Share of positions that hold a token, over the micro-batches in use (1.0 where none is)."""
    held = batch.segment_ids > 0
    used = held.any(axis=(1, 2))
    return float(held[used].mean()) if used.any() else 1.0


def _member(sample: Sample, row_tokens: int) -> Member:
    length, prompt_tokens = len(sample.token_ids), sample.prompt_length
    assert prompt_tokens > 0, "a sample must train some token, and not its first"
    if length > row_tokens:
        raise ValueError(
            f"a sample of {length} tokens ({prompt_tokens} of them prompt) does not fit a row: raise "
            f"batch.row_tokens={row_tokens} to at least {length}, or allow fewer tokens per trajectory"
        )
    return Member(sample, prompt_tokens, length - prompt_tokens)


def _plan_rows(members: list[Member], row_tokens: int) -> list[list[Family]]:
    """First fit, biggest family first. Of one that fits nowhere whole, the emptiest row takes what it can (a
    copy of the prompt costs no more than the padding that it replaces), and the others go on."""
    families: dict[bytes, Family] = {}
    for member in members:
        families.setdefault(member.sample.token_ids[: member.prompt_tokens].tobytes(), []).append(member)
    rows: list[list[Family]] = []
    free_tokens = np.zeros(len(members), np.int64)  # of each row; 0 while it is not open
    for family in sorted(families.values(), key=_num_tokens, reverse=True):
        prompt_tokens = family[0].prompt_tokens
        waiting = sorted(family, key=lambda member: member.tail_tokens, reverse=True)
        while waiting:
            fits = np.flatnonzero(free_tokens >= _num_tokens(waiting))
            row = int(fits[0] if fits.size else free_tokens.argmax())
            part, rest = _split(waiting, int(free_tokens[row]) - prompt_tokens)
            if not part:
                row = len(rows)
                rows.append([])
                free_tokens[row] = row_tokens
                part, rest = _split(waiting, row_tokens - prompt_tokens)
            rows[row].append(part)
            free_tokens[row] -= _num_tokens(part)
            waiting = rest
    return rows


def _split(family: Family, free_tokens: int) -> tuple[Family, Family]:
    """(members whose tails fit together into `free_tokens`, the others), first come first served."""
    part, rest = [], []
    for member in family:
        if member.tail_tokens <= free_tokens:
            free_tokens -= member.tail_tokens
            part.append(member)
        else:
            rest.append(member)
    return part, rest


def _num_tokens(family: Family) -> int:
    return family[0].prompt_tokens + sum(member.tail_tokens for member in family)


def _write(row: PackedBatch, family: Family, start: int, segment_id: int) -> int:
    """Write a prompt and its tails into `row` (fields [T]) from `start` on; returns where they end."""
    first, length, _ = family[0]
    fork = start + length
    prompt = slice(start, fork)
    row.token_ids[prompt] = first.token_ids[:length]
    row.positions[prompt] = np.arange(length)
    row.segment_ids[prompt] = segment_id
    row.parents[prompt] = np.arange(start - 1, fork - 1)
    row.parents[start] = -1
    end = fork
    for sample, _, tail_tokens in family:
        segment_id += 1
        tail = slice(end, end + tail_tokens)
        end = tail.stop
        row.token_ids[tail] = sample.token_ids[length:]
        row.positions[tail] = np.arange(length, length + tail_tokens)
        row.segment_ids[tail] = segment_id
        row.parents[tail] = np.arange(tail.start - 1, end - 1)
        row.parents[tail.start] = fork - 1
        row.loss_weights[tail] = sample.loss_mask[length:] * np.float32(sample.num_copies)
        row.advantages[tail] = sample.advantage
        row.sampler_logprobs[tail] = sample.logprobs[length:]
    lengths = [length, *(member.tail_tokens for member in family)]
    row.visible_until[start:end] = start + tree_ends(lengths, [-1] + [0] * len(family))
    return end

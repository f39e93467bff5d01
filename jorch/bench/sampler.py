"""`jorch bench sampler`: decoding of siblings with their prompt's beginning kept once, beside a copy for each row."""

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jorch.export import pretrained
from jorch.metrics import stage
from jorch.model.decode import Decoder
from jorch.model.transformer import Params, Qwen3
from jorch.rollout.row_batch import RowBatch
from jorch.run_folder import atomic_write
from jorch.sections import MeshConfig
from jorch.sharding import make_mesh
from jorch.versions import versions

NUM_ROUNDS, NEW_TOKENS, SIBLINGS = 7, 64, 8
CASES = ((1, 2048), (4, 2048), (16, 256), (16, 128))
"""Prompts, and tokens of each."""


class Figure(NamedTuple):
    """One case both ways; seconds of a completion of all rows, and bytes of the cache."""

    num_prompts: int
    prompt_tokens: int
    copied_s: tuple[float, ...]
    shared_s: tuple[float, ...]
    copied_bytes: int
    shared_bytes: int

    @property
    def num_tokens(self) -> int:
        """Sampled in one completion of all rows."""
        return self.num_prompts * SIBLINGS * NEW_TOKENS

    @property
    def speedup(self) -> float:
        """Median over rounds."""
        return float(np.median(np.divide(self.copied_s, self.shared_s)))


def run(json_path: Path | None, cases: tuple[tuple[int, int], ...] = CASES, num_rounds: int = NUM_ROUNDS) -> None:
    """Measure the quickstart's model both ways in turns, print the table, and write the same numbers to `json_path`."""
    start = pretrained.load("base", make_mesh(MeshConfig()))
    figures = []
    with stage("sampler", len(cases)) as progress:
        for num_prompts, prompt_tokens in cases:
            figures.append(_measure(start.model, start.params, num_prompts, prompt_tokens, num_rounds))
            progress.advance()
    where = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {datetime.date.today()}"
    _print(figures, f"{SIBLINGS} siblings a prompt, {NEW_TOKENS} new tokens; medians of {num_rounds}; {where}")
    if json_path is not None:
        content = {"device": where, "versions": versions(), "figures": [figure._asdict() for figure in figures]}
        atomic_write(json_path, json.dumps(content, indent=1) + "\n")


def _measure(model: Qwen3, params: Params, num_prompts: int, prompt_tokens: int, num_rounds: int) -> Figure:
    rng, decoder = np.random.default_rng(0), Decoder(model, NEW_TOKENS, stop_id=-1)
    weights = decoder.prepare(params)
    prompts = rng.integers(4, model.config.vocab_size, (num_prompts, prompt_tokens + 7)).astype(np.int32)
    rows = [prompt for prompt in prompts for _ in range(SIBLINGS)]

    def once(min_shared: int) -> tuple[float, int]:
        batch = RowBatch(
            decoder,
            max_rows=len(rows),
            max_context_tokens=prompt_tokens + 4 * NEW_TOKENS,
            chunk_tokens=256,
            min_shared=min_shared,
        )
        batch.prefill(weights, rows)
        num_bytes = batch.num_bytes
        began = time.perf_counter()
        batch.decode(weights, {row: (NEW_TOKENS, row) for row in range(len(rows))}, 1.0)
        return time.perf_counter() - began, num_bytes

    ways = (sys.maxsize, 1)
    for way in ways:
        once(way)  # compiles
    rounds = [[once(way) for way in ways] for _ in range(num_rounds)]
    (copied_s, shared_s) = (tuple(seconds for seconds, _ in column) for column in zip(*rounds, strict=True))
    (_, copied_bytes), (_, shared_bytes) = rounds[0]
    return Figure(num_prompts, prompt_tokens, copied_s, shared_s, copied_bytes, shared_bytes)


def _print(figures: list[Figure], caption: str) -> None:
    table = Table(caption=caption, caption_justify="left")
    for title in ("prompts", "tokens each", "copied, tokens/s", "kept once, tokens/s", "faster", "cache, MB"):
        table.add_column(title, justify="right")
    for f in figures:
        rates = (f"{f.num_tokens / np.median(seconds):,.0f}" for seconds in (f.copied_s, f.shared_s))
        memory = f"{f.copied_bytes / 1e6:,.1f} -> {f.shared_bytes / 1e6:,.1f}"
        table.add_row(str(f.num_prompts), f"{f.prompt_tokens:,}", *rates, f"{f.speedup:.2f} x", memory)
    Console(width=None if sys.stdout.isatty() else 110).print(table)

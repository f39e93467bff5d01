"""`jorch bench train`: a real train step of a slice of Qwen3-8B, beside the same step with jax's own attention.

Both run in this process on the same weights and rows, and their first losses are compared before anything is timed.
The timed loop is the trainer's: step n is dispatched before the metrics of step n - 1 are read.
"""

import copy
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jorch.data.packing import pack
from jorch.flops import peak_flops, train_flops
from jorch.metrics import stage
from jorch.model import lora
from jorch.model.attention import PackedRows
from jorch.model.transformer import Qwen3, Trainable
from jorch.plan.job import PUBLISHED
from jorch.run_folder import atomic_write
from jorch.sections import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, Remat
from jorch.sharding import make_mesh, shard_batch
from jorch.train.optimizer import make_optimizer
from jorch.train.sft import cross_entropy
from jorch.train.speed import work_of
from jorch.train.state import init_state
from jorch.train.step import make_train_step
from jorch.types import PackedBatch, Sample
from jorch.versions import versions

NUM_TIMINGS, NUM_WARM_UPS = 10, 2
MOST_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative difference of the first losses that roundings of the compute dtype explain."""
SEGMENTS = {"one sequence": (1,), "packed": (4, 24, 7, 13, 5, 11)}
"""Rows to measure: the relative lengths of their sequences, which do not see each other."""
FORMULA = (
    "FLOPs = 6 P tokens + 12 L N H pairs, with LoRA 4 P + 6 A in place of 6 P, recomputation not counted; "
    "FLOP/s = FLOPs / (seconds x devices), MFU = FLOP/s / peak"
)


class Timing(NamedTuple):
    """One row length, kind of row and attention; seconds of a step, bytes as XLA plans them on one device."""

    row_tokens: int
    rows: str
    attention: str
    median_s: float
    q25_s: float
    q75_s: float
    tokens_per_s: float
    flops_per_s: float
    """Of a device, by `FORMULA`."""
    flops_per_s_dense: float
    """As if every row were one square, with nothing masked."""
    mfu: float | None
    """None where the device's peak is unknown."""
    mfu_dense: float | None
    peak_bytes: int | None
    loss: float
    """Of the first step, which both attentions must agree on."""


class Setup(NamedTuple):
    """What is trained."""

    config: ModelConfig
    low_rank: LoraConfig | None
    mesh: Mesh


def run(
    json_path: Path | None, tokens: list[int] | None, num_layers: int | None, with_lora: bool, remat: Remat
) -> None:
    """Measure, print the table, and write the same numbers to `json_path`. Raises ValueError for too many layers."""
    on_cpu = jax.default_backend() == "cpu"
    config = _config(on_cpu, num_layers, with_lora, remat)
    if on_cpu:
        print("no accelerator here: small shapes on the CPU, which say nothing about a GPU or TPU")
    setup = Setup(config, LoraConfig() if with_lora else None, make_mesh(MeshConfig(fsdp=jax.device_count())))
    lengths = tokens or ([512] if on_cpu else [8192, 32768])
    cases = [(length, rows, name) for length in lengths for rows in SEGMENTS for name in ATTENTIONS]
    timings: list[Timing] = []
    with stage("train steps", len(cases)) as progress:
        for case in cases:
            timings.append(measure(setup, *case))
            progress.advance()
    _check(timings, config.compute_dtype)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    print_table(timings, setup, device)
    if json_path is not None:
        measured: dict[str, Any] = {"device": device, "date": datetime.date.today().isoformat(), "versions": versions()}
        measured |= {"model": config.model_dump(), "lora": setup.low_rank and setup.low_rank.model_dump()}
        measured |= {"formula": FORMULA, "num_timings": NUM_TIMINGS, "timings": [t._asdict() for t in timings]}
        atomic_write(json_path, json.dumps(measured, indent=1) + "\n")
        print(f"written: {json_path}")


def _config(on_cpu: bool, num_layers: int | None, with_lora: bool, remat: Remat) -> ModelConfig:
    """Qwen3-8B with few layers, or with LoRA with all and its frozen weights in bfloat16; something small on a CPU."""
    whole = PUBLISHED["Qwen3-8B"]
    if num_layers is not None and num_layers > whole.num_hidden_layers:
        raise ValueError(f"--layers {num_layers}: Qwen3-8B has {whole.num_hidden_layers}")
    if on_cpu:
        sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": num_layers or 2}
        return whole.model_copy(update=sizes | heads | {"remat": remat})
    layers = num_layers or (whole.num_hidden_layers if with_lora else 4)
    dtypes = {"param_dtype": "bfloat16" if with_lora else "float32", "compute_dtype": "bfloat16"}
    return whole.model_copy(update={"num_hidden_layers": layers, "remat": remat} | dtypes)


def jax_rows(mask_BT: jax.Array, head_dim: int, mesh: Mesh | None) -> PackedRows:
    """As `packed_rows`, by `jax.nn.dot_product_attention` with a mask [B, 1, T, T]; cuDNN's on an NVIDIA GPU."""
    position = jnp.arange(mask_BT.shape[1])
    seen_B1TS = ((position <= position[:, None]) & (position[:, None] < mask_BT[:, None, :]))[:, None]
    return _by_jax(head_dim, mesh, mask=seen_B1TS)


def jax_causal_rows(mask_BT: jax.Array, head_dim: int, mesh: Mesh | None) -> PackedRows:
    """The same for rows that hold one sequence: causal, without a mask."""
    return _by_jax(head_dim, mesh, is_causal=True)


def _by_jax(head_dim: int, mesh: Mesh | None, **mask: Any) -> PackedRows:
    # On GPUs the default is XLA's dense attention, which would be a straw man.
    implementation = "cudnn" if jax.default_backend() == "gpu" else None

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, scale=head_dim**-0.5, implementation=implementation, **mask
        )

    return PackedRows(attend, None, mesh)


ATTENTIONS = ("jorch", "jax.nn.dot_product_attention")


def measure(setup: Setup, row_tokens: int, rows: str, attention: str) -> Timing:
    """Time the step on one kind of rows with one attention, one row a device."""
    config, low_rank, mesh = setup
    base, optimizer = Qwen3(config), make_optimizer(OptimizerConfig(learning_rate=1e-4), 1000)
    model, params, frozen = lora.start(base, base.init(jax.random.key(0), mesh), low_rank, 0, mesh)
    if attention != "jorch":
        model = _with_rows(model, jax_causal_rows if rows == "one sequence" else jax_rows)
    batch = _batch(config, SEGMENTS[rows], row_tokens, jax.device_count())
    step: Any = make_train_step(model, optimizer, cross_entropy, mesh)
    state = init_state(model, optimizer, mesh, params)
    del params
    arguments = (shard_batch(mesh, batch), float(jax.device_count()), frozen)
    compiled = step.lower(state, *arguments).compile()
    seconds, loss = _time(compiled, state, arguments)
    low, median, high = np.percentile(seconds, (25, 50, 75))
    num_tokens = batch.token_ids.size
    peak, work = peak_flops(jax.devices()[0].device_kind), work_of(batch)
    rates = [
        train_flops(config, num_tokens, pairs, low_rank) / (float(median) * jax.device_count())
        for pairs in (work.num_pairs, work.num_dense_pairs)
    ]
    shares = [peak and flops_per_s / peak for flops_per_s in rates]
    planned = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", None)
    quartiles = float(median), float(low), float(high)
    rate = num_tokens / float(median)
    return Timing(row_tokens, rows, attention, *quartiles, rate, *rates, *shares, peak_bytes=planned, loss=loss)


def _with_rows(model: Trainable, rows: Callable[..., PackedRows]) -> Trainable:
    """The model with another attention."""
    other: Any = copy.copy(model)

    def bind(*params: Any) -> Any:
        module = model.bind(*params)
        module.packed_rows = rows
        return module

    other.bind = bind
    return other


def _batch(config: ModelConfig, weights: tuple[int, ...], row_tokens: int, num_rows: int) -> PackedBatch:
    """One micro-batch of full rows, all tokens but the first of a sequence trained; the same one every time."""
    rng = np.random.default_rng(0)
    stops = np.cumsum(weights) * row_tokens // sum(weights)
    samples = []
    for length in np.diff(stops, prepend=0).tolist() * num_rows:
        token_ids = rng.integers(0, config.vocab_size, length).astype(np.int32)
        samples.append(Sample(token_ids, np.arange(length) > 0, np.zeros(length, np.float32), 1.0))
    batch = pack(samples, row_tokens=row_tokens, micro_rows=num_rows, num_micro=1)
    assert (batch.segment_ids > 0).all(), "a row is not full"
    return batch


def _time(step: Callable[..., Any], state: Any, arguments: tuple[Any, ...]) -> tuple[list[float], float]:
    """Seconds between the ends of consecutive steps, and the first loss."""
    losses: list[float] = []
    ends: list[float] = []
    waiting = None
    for _ in range(NUM_WARM_UPS + NUM_TIMINGS + 1):
        state, metrics = step(state, *arguments)
        if waiting is not None:
            losses.append(float(waiting["train/loss"]))
            ends.append(time.perf_counter())
        waiting = metrics
    return np.diff(ends[NUM_WARM_UPS - 1 :]).tolist(), losses[0]


def _check(timings: list[Timing], dtype: str) -> None:
    for ours, theirs in zip(timings[::2], timings[1::2], strict=True):
        error = abs(ours.loss - theirs.loss) / abs(theirs.loss)
        assert error <= MOST_ERROR[dtype], f"{ours.rows}, {ours.row_tokens} tokens: the losses differ by {error:.1e}"


def print_table(timings: list[Timing], setup: Setup, device: str) -> None:
    """One line a case; both attentions beside each other."""
    config, low_rank, _ = setup
    trained = f"LoRA, rank {low_rank.rank}" if low_rank else "all parameters"
    model = f"D={config.hidden_size}, {config.num_hidden_layers} layers, {config.compute_dtype}, remat {config.remat}"
    spread = f"median ± half of the interquartile range of {NUM_TIMINGS} steps"
    caption = f"{trained}; {model}\n{device}, {datetime.date.today()}; {spread}\n{FORMULA}"
    table = Table(caption=caption, caption_justify="left")
    for title in ("tokens a row", "rows", "attention"):
        table.add_column(title, no_wrap=True)
    for title in ("step, ms", "tokens/s", "GFLOP/s", "dense eq.", "MFU, %", "dense eq., %", "planned peak, GB"):
        table.add_column(title, justify="right")
    for number, t in enumerate(timings):
        shares = ("–" if share is None else f"{100 * share:.1f}" for share in (t.mfu, t.mfu_dense))
        planned = "–" if t.peak_bytes is None else f"{t.peak_bytes / 1e9:,.2f}"
        spread = f"{1e3 * t.median_s:,.3g} ±{500 * (t.q75_s - t.q25_s):,.2g}"
        rates = (f"{rate / 1e9:,.0f}" for rate in (t.flops_per_s, t.flops_per_s_dense))
        cells = (f"{t.row_tokens:,}", t.rows, t.attention, spread, f"{t.tokens_per_s:,.0f}", *rates, *shares, planned)
        table.add_row(*cells, end_section=number % 2 == 1)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        print(f"most memory in use on a device, over all cases: {stats['peak_bytes_in_use'] / 1e9:,.2f} GB")

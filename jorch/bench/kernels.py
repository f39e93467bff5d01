"""`jorch bench kernels`: the table, JSON and plot of what `kernels.bench` measures."""

import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jorch.metrics import stage
from jorch.run_folder import atomic_write
from jorch.versions import versions
from kernels.bench import CASES, NUM_TIMINGS, LeftOut, Timing, measure, shapes_here


def run(json_path: Path | None, tokens: list[int] | None, cases: Sequence[str] = CASES) -> None:
    """Measure, print the table, and write the same numbers to `json_path` and a plot of attention beside it."""
    shapes = shapes_here()
    if tokens:
        shapes = shapes._replace(attention_tokens=tuple(tokens))
    if jax.default_backend() == "cpu":
        print("no accelerator here: small shapes on the CPU, which say nothing about a GPU or TPU")
    timings: list[Timing] = []
    left_out: list[LeftOut] = []
    with stage("kernels") as progress:
        for found in measure(shapes, cases=cases):
            if isinstance(found, LeftOut):
                left_out.append(found)
                continue
            timings.append(found)
            progress.advance()
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    print_table(timings, f"{device}, {shapes.dtype}, {datetime.date.today()}")
    for line in reasons(left_out):
        print(line)
    if json_path is not None:
        measured: dict[str, Any] = {"device": device, "date": datetime.date.today().isoformat()}
        measured |= {"versions": versions(), "shapes": shapes._asdict(), "num_timings": NUM_TIMINGS}
        measured["timings"] = [
            t.line._asdict() | {k: v for k, v in t._asdict().items() if k != "line"} for t in timings
        ]
        measured["left_out"] = [line._asdict() for line in left_out]
        atomic_write(json_path, json.dumps(measured, indent=1) + "\n")
        written = [json_path]
        if any(t.line.kernel == "attention" for t in timings):
            written.append(json_path.with_suffix(".png"))
            plot(timings, device, written[-1])
        print(f"written: {', '.join(map(str, written))}")


def print_table(timings: list[Timing], device: str) -> None:
    """One row for each path of a case, its passes beside each other."""
    caption = (
        "median ± half of the interquartile range; rates, scratch and peak (with inputs and outputs) of both passes "
        f"where there are two, dense eq. as if the row were causal\n{device}, {NUM_TIMINGS} timings each"
    )
    table = Table(caption=caption, caption_justify="left")
    for title in ("", "tokens", "path"):
        table.add_column(title, no_wrap=True)
    for title in (
        "forward, ms",
        "backward, ms",
        "both, ms",
        "GFLOP/s",
        "dense eq.",
        "scratch, MB",
        "peak, MB",
        "error",
    ):
        table.add_column(title, justify="right")
    before = None
    for (case, num_tokens, path), passes in _rows(timings).items():
        if before not in (None, (case, num_tokens)):
            table.add_section()
        before, last = (case, num_tokens), list(passes.values())[-1]
        table.add_row(
            case,
            f"{num_tokens:,}",
            path,
            *(_milliseconds(passes.get(direction)) for direction in ("forward", "backward", "both")),
            f"{last.visible_flops_s / 1e9:,.3g}",
            f"{last.dense_flops_s / 1e9:,.3g}",
            f"{last.scratch_bytes / 1e6:,.3g}",
            f"{last.peak_bytes / 1e6:,.3g}",
            f"{last.line.error:.0e}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _rows(timings: list[Timing]) -> dict[tuple[str, int, str], dict[str, Timing]]:
    rows: dict[tuple[str, int, str], dict[str, Timing]] = {}
    for t in timings:
        key = (f"{t.line.kernel}, {t.line.case}", t.line.num_tokens, t.line.path)
        rows.setdefault(key, {})[t.line.direction] = t
    return rows


def reasons(left_out: list[LeftOut]) -> list[str]:
    """What was not timed and why: one line for each path and reason, with the cases that it concerns."""
    cases: dict[tuple[str, str], list[str]] = {}
    for line in left_out:
        cases.setdefault((line.path, line.reason), []).append(f"{line.case} {line.num_tokens:,}")
    return [f"left out: {path}: {reason} ({', '.join(of)})" for (path, reason), of in cases.items()]


def _milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    return f"{1e3 * timing.median_s:,.3g} ±{500 * (timing.q75_s - timing.q25_s):,.2g}"


def plot(timings: list[Timing], device: str, path: Path) -> None:
    """Time of both passes over length, one panel a mask."""
    from matplotlib.figure import Figure

    shown = [t for t in timings if (t.line.kernel, t.line.direction) == ("attention", "both")]
    cases = list(dict.fromkeys(t.line.case for t in shown))
    figure = Figure(figsize=(4 * len(cases), 3.5), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for panel, case in zip(panels, cases, strict=True):
        lines: dict[str, list[Timing]] = {}
        for t in shown:
            if t.line.case == case:
                lines.setdefault(t.line.path, []).append(t)
        for name, points in lines.items():
            spread = [[t.median_s - t.q25_s for t in points], [t.q75_s - t.median_s for t in points]]
            tokens, seconds = [t.line.num_tokens for t in points], [t.median_s for t in points]
            panel.errorbar(tokens, seconds, yerr=spread, label=name, marker="o")
        panel.set(title=case, xlabel="tokens", xscale="log", yscale="log")
    panels[0].set_ylabel("forward and backward, s")
    panels[0].legend()
    figure.suptitle(f"attention on {device}")
    figure.savefig(path, dpi=120)

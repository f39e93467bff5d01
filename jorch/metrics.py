"""Metric names with their units, and where metrics go: metrics.jsonl, TensorBoard events, the console.

A loop calls `MetricWriter.write` once a step; a piece of work that a person waits for is a `stage`. Needs no
jax.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jorch.run_folder import METRICS as METRICS_FILE
from jorch.run_folder import atomic_write, naming, read_jsonl
from jorch.types import TERMINATIONS

METRICS = {
    "reward/mean": "group reward, mean over trajectories",
    "rollout/utility": "miniature world: solved, less weighted cost and latency, plus the user's wish",
    "rollout/accuracy": "share of trajectories solved",
    "rollout/cost_usd": "USD per trajectory, tools and orchestrator",
    "rollout/latency_s": "seconds per trajectory, as billed",
    "rollout/preference_followed": "share of the tasks with a preference in which it was followed",
    "rollout/format_valid": "share of trajectories in which every call parsed and fitted its tool",
    "rollout/answered": "share that ended with an answer",
    "rollout/malformed_calls": "per trajectory",
    "rollout/tool_calls_per_turn": "calls per completion; malformed ones apart",
    "rollout/turns": "completions per trajectory",
    "rollout/sampled_tokens": "in the step",
    "rollout/infra_error": "share lost to server or network failures, or to the deadline",
    **{f"termination/{name}": "share of trajectories that ended so, lost ones included" for name in TERMINATIONS},
    "queue/ready_groups": "finished groups that wait for the trainer, after it took its share",
    "queue/running_groups": "groups that are being played meanwhile",
    "queue/stale_groups": "dropped in the step: a token older than max_policy_lag",
    "queue/lost_groups": "dropped in the step: half of the siblings lost",
    "policy/lag": "updates between the weights that drew a token and those that it trains, mean over tokens",
    "policy/lag_max": "the same, of the oldest token",
    "group/dropped_fraction": "share of groups that teach nothing: all rewards alike",
    "samples/trained": "trajectories in the loss",
    "samples/distinct": "of these, after identical siblings were merged",
    "packing/fill": "share of the row positions that hold a token",
    "policy/loss": "clipped surrogate, nats",
    "policy/entropy_nats": "per sampled token",
    "policy/sampler_gap_nats": "|trainer - sampler| log-probability, mean over trained tokens",
    "policy/log_ratio_p01_nats": "log(trainer / sampler) before the step, 1st percentile of trained tokens",
    "policy/log_ratio_p50_nats": "the same, median",
    "policy/log_ratio_p99_nats": "the same, 99th percentile; each to within 8 %",
    "policy/ratio": "new over old probability, mean over tokens",
    "policy/clip_low_fraction": "share of tokens clipped from below",
    "policy/clip_high_fraction": "share of tokens clipped from above",
    "policy/clip_dual_fraction": "share of tokens bounded where the advantage is negative",
    "policy/truncated_fraction": "share of tokens whose importance weight was capped",
    "policy/kl_nats": "policy against reference, per token",
    "train/loss": "what the optimizer minimises, nats",
    "train/perplexity": "of demonstrated tokens",
    "train/grad_norm": "global, before clipping",
    "train/skipped": "1 where the gradient was not finite and nothing changed",
    "train/loss_tokens": "tokens in the loss, copies counted",
    "time/step_s": "seconds of the whole step",
    "time/sample_s": "seconds in the sampler",
    "time/tools_s": "seconds of rollouts outside the sampler: tool server and driver",
    "time/wait_s": "seconds in which the trainer waited for rollouts that go on beside it",
    "time/push_s": "seconds in which the rollout process took the latest new weights",
    "time/pack_s": "seconds in rewards, advantages, samples and packing",
    "time/learn_s": "seconds in the train step",
    "time/data_s": "seconds until the batch is packed: demonstrations; in RL rollouts and rewards",
    "time/compute_s": "seconds in which the host waited for the devices; in RL time/learn_s",
    "time/host_s": "seconds of the step in neither: dispatch, metrics, checkpoints; in RL new weights for the samplers",
    "speed/tokens_per_s_per_device": "tokens in the rows, padding apart, over time/step_s; in RL over time/learn_s",
    "speed/flops_per_s_per_device": "(6 P tokens + 12 L N H pairs) / (s x devices); pairs that see each other",
    "speed/flops_per_s_per_device_dense": "the same with every token seeing a whole row, as if nothing were masked",
    "speed/mfu": "speed/flops_per_s_per_device over a device's peak (key peak_flops; else by the device's name)",
    "speed/mfu_dense": "the same of speed/flops_per_s_per_device_dense",
}
"""What may be written: group/name, with the unit as a suffix where there is one -> what it is."""

_SECONDS_BETWEEN_LINES = 30.0


class MetricWriter:
    """Writes one object a step to metrics.jsonl and the same numbers as TensorBoard events.

    Example line: {"step": 3, "time_s": 12.3, "reward/mean": 0.71}. `time_s` counts seconds of training, over
    all the processes that worked on this run.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        """Forgets what was written at `resume_step` and later, a half-written last line included."""
        self._path = folder / METRICS_FILE
        kept = [row for row in read_jsonl(self._path) if row["step"] < resume_step]
        atomic_write(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._began = time.monotonic() - (kept[-1]["time_s"] if kept else 0.0)
        self._events = _Events(folder / "tensorboard", resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line. NaN and infinities are written as null, since JSON has none. Raises OSError."""
        unknown = metrics.keys() - METRICS.keys()
        assert not unknown, f"metrics {sorted(unknown)} are not in jorch.metrics.METRICS"
        values = {name: float(value) for name, value in metrics.items()}
        row: dict[str, Any] = {"step": step, "time_s": round(time.monotonic() - self._began, 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with naming(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._events.write(step, values)

    def close(self) -> None:
        with naming(self._path):
            self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _protocol() -> tuple[Any, Any]:
    """TensorBoard's message types; generated code, which says nothing to a type checker."""
    from tensorboardX.proto import event_pb2, summary_pb2

    return event_pb2, summary_pb2


class _Events:
    """TensorBoard's file of events. tensorboardX's own SummaryWriter writes in a thread: once that has met a full
    disk, the training loop would wait for it for ever."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # heavy: 0.4 s

        event_pb2, _ = _protocol()
        self._folder = folder
        with naming(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=purge_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        event_pb2, summary_pb2 = _protocol()
        scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=scalars)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with naming(self._folder):
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()


class Stage:
    """A piece of work that a person waits for. `advance` moves its bar, or now and then prints a line."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done = name, total, 0
        self.shown: dict[str, Any] = {}
        self._progress: Any = None
        if sys.stdout.isatty():
            self._start_bar()
        self.began = self.last_line = time.monotonic()

    def advance(self, amount: int = 1, **shown: Any) -> None:
        """`shown`: the numbers beside the bar, e.g. reward=0.71; the latest stay for the summary line."""
        self.done += amount
        self.shown |= shown
        if self._progress is not None:
            self._progress.update(self._bar, completed=self.done, shown=_numbers(self.shown))
        elif self.done != self.total and time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """Example: `rollouts        12/80    3.2 s  reward 0.71`."""
        count = f"{self.done or ''}" if self.total is None else f"{self.done}/{self.total}"
        seconds = f"{time.monotonic() - self.began:.1f} s"
        return f"{self.name:<24}{count:>12}{seconds:>10}  {_numbers(self.shown)}".rstrip()

    def stop(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()

    def _start_bar(self) -> None:
        from rich import progress

        columns = ("{task.description:<24}", progress.BarColumn(), progress.MofNCompleteColumn())
        times = (progress.TimeElapsedColumn(), "{task.fields[shown]}")
        self._progress = progress.Progress(*columns, *times, transient=True)
        self._bar = self._progress.add_task(self.name, total=self.total, shown="")
        self._progress.start()


@contextmanager
def stage(name: str, total: int | None = None) -> Iterator[Stage]:
    """A stage with a bar on a terminal, and one line at its end anywhere; it says so when it was cut short.

    Example: `with stage("training", total=80) as work: work.advance(reward=0.71)`.
    """
    work = Stage(name, total)
    try:
        yield work
    except BaseException:
        work.stop()
        print(f"{work.line()}  stopped", flush=True)
        raise
    work.stop()
    print(work.line(), flush=True)


def _numbers(shown: Mapping[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())

"""What an RL run writes after every step, and when it ends early: between `rl/loop.py` and the run folder."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jorch.checkpoint import Checkpoints, base_meta, describe
from jorch.config import RlConfig
from jorch.data.tokenizer import Tokenizer
from jorch.export import pretrained
from jorch.metrics import MetricWriter, Stage, stage
from jorch.processes import is_writer
from jorch.rl.alarms import Alarms
from jorch.rl.report import TrajectoryLog
from jorch.run_folder import METRICS, read_jsonl
from jorch.stopping import Terminated, on_sigterm
from jorch.train.state import TrainState
from jorch.types import Group


class Records(ExitStack):
    """What a run writes after every step: checkpoint, metrics, trajectories, progress."""

    def __init__(
        self,
        config: RlConfig,
        folder: Path,
        start: pretrained.Pretrained,
        frozen: Any,
        checkpoints: Checkpoints,
        first_step: int,
    ) -> None:
        super().__init__()
        self.first_step = first_step
        self._steps = config.steps
        self._checkpoints = checkpoints
        self._meta = describe(config, start.model.config, start.tokenizer.digest)
        self._meta |= base_meta(config.init_from, frozen)
        self._log = self.enter_context(_log(config, folder, first_step, start.tokenizer))

    def begin(self, state: TrainState, num_groups: int) -> None:
        """Once everything stands ready; `num_groups` have been used up by earlier steps."""
        meta = self._meta | {"data_position": num_groups}
        self._checkpoints.save(self.first_step, state, meta, force=True)
        self._progress = self.enter_context(stage("reinforcement learning", self._steps))
        self._progress.advance(self.first_step)
        self._told_to_end = self.enter_context(on_sigterm())

    def write(
        self, step: int, state: TrainState, metrics: dict[str, float], groups: list[Group], num_groups: int
    ) -> None:
        """Raises Terminated after SIGTERM, with a checkpoint of this step."""
        self._log(step, metrics, groups)
        ends, is_last = self._told_to_end(step + 1), step + 1 == self._steps
        meta = self._meta | {"data_position": num_groups}
        self._checkpoints.save(step + 1, state, meta, metrics=metrics, force=ends or is_last)
        _advance(self._progress, metrics)
        if ends and not is_last:
            self._checkpoints.wait()
            raise Terminated(f"stopped by SIGTERM after step {step}, which is saved")


@contextmanager
def _log(
    config: RlConfig, folder: Path, first_step: int, tokenizer: Tokenizer
) -> Iterator[Callable[[int, dict[str, float], list[Group]], None]]:
    """A function that writes down a step's metrics and some of its trajectories, in the one process that does."""
    if not is_writer():
        yield lambda step, metrics, groups: None
        return
    alarms = Alarms(config.watch)
    for row in read_jsonl(folder / METRICS):
        if row["step"] < first_step:
            alarms.check(row["step"], row)
    trajectories = TrajectoryLog(folder, first_step, tokenizer, config.log_trajectories)
    with MetricWriter(folder, first_step) as writer, trajectories:

        def write(step: int, metrics: dict[str, float], groups: list[Group]) -> None:
            writer.write(step, metrics)
            trajectories.write(step, groups)
            for line in alarms.check(step, metrics):
                print(line, flush=True)

        yield write


def _advance(progress: Stage, metrics: dict[str, float]) -> None:
    progress.advance(
        reward=metrics.get("reward/mean", math.nan),  # where all groups were left out
        accuracy=metrics.get("rollout/accuracy", math.nan),
        cost_usd=metrics.get("rollout/cost_usd", math.nan),
        step_s=metrics["time/step_s"],
    )

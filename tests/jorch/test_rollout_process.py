"""What the trainer asks of the process that plays rollouts, and what it takes; `commands/test_asynchronous.py` runs the
process itself.
"""

from pathlib import Path

import numpy as np
import pytest

from jorch import config_io
from jorch.config import QuickstartConfig
from jorch.data.tasks import TaskStream
from jorch.rl.rollout_process import Failed, Job, Loaded, Play, Played, RolloutProcess
from jorch.rollout.tool_client import ToolServerDown
from jorch.rollout.vllm_sampler import SamplerDown
from jorch.sections import MiniatureConfig
from jorch.synth import miniature
from jorch.types import Completion, Trajectory, Turn

SIZE, SIBLINGS = 2, 4
TASKS = list(miniature.tasks(MiniatureConfig(num_train=16), "train", 0))


class Rollouts(RolloutProcess):
    """Before it was started: what it would send is kept, and what arrives is put into its inbox by the tests."""

    def __post_init__(self):
        super().__post_init__()
        self.told = []

    def _send(self, message):
        assert isinstance(message, Play)
        self.told += message.tasks

    def plays(self, number, versions=(0,), lost=0):
        """Group `number` comes in: tokens of these versions, so many of its siblings lost."""
        task_id = self.stream.batch(number)[0].task_id
        ids = np.arange(len(versions), dtype=np.int32)
        completion = Completion(ids, np.zeros(len(ids), np.float32), "stop", np.array(versions, np.int32))
        turns = (Turn(np.zeros(1, np.int32), completion, (), ()),)
        siblings = [
            Trajectory(task_id, f"{number}/{i}", () if i < lost else turns, "infra_error" if i < lost else "answered",
                       1.0, 0, 0.0, 0.0, {})
            for i in range(SIBLINGS)
        ]  # fmt: skip
        self._inbox.put(Played(number, siblings, 1.5))


def make(max_policy_lag=1, num_used=0) -> Rollouts:
    rl = config_io.load(config_io.configs_dir() / "quickstart.yaml", QuickstartConfig).rl
    config = rl.model_copy(update={"tasks_per_step": SIZE, "group_size": SIBLINGS, "max_policy_lag": max_policy_lag})
    job = Job(config, Path("run"), "http://127.0.0.1:1", (), Path("v0"))
    return Rollouts(job, TaskStream(TASKS, 1, 0), 0, num_used)


def numbers(trajectories):
    return [int(siblings[0].trajectory_id.split("/")[0]) for siblings in trajectories]


def test_as_many_groups_are_under_way_as_stay_fresh():
    rollouts = make(max_policy_lag=2)
    for number in (1, 0):
        rollouts.plays(number)
    tasks, trajectories, metrics = rollouts.take(0)
    assert rollouts.told == [0, 1, 2, 3, 4, 5]
    assert numbers(trajectories) == [0, 1]
    assert [t.task_id for t in tasks] == [siblings[0].task_id for siblings in trajectories]
    assert tasks == TaskStream(TASKS, SIZE, 0).batch(0), "the order in which tasks are met is the synchronous one"
    assert (metrics["queue/ready_groups"], metrics["queue/running_groups"]) == (0, 4)
    assert metrics["time/sample_s"] == 1.5
    for number in (2, 3):
        rollouts.plays(number)
    rollouts.take(1)
    assert rollouts.told == list(range(8))


def test_no_group_is_waited_for():
    rollouts = make()
    for number in (1, 3):
        rollouts.plays(number)
    _, trajectories, metrics = rollouts.take(0)
    assert numbers(trajectories) == [1, 3]
    assert metrics["queue/running_groups"] == 2


def test_a_token_that_is_too_old_costs_its_group():
    rollouts = make(max_policy_lag=1)
    for number, versions in ((0, (3, 4)), (1, (2, 4)), (2, (4,)), (3, (5,))):
        rollouts.plays(number, versions)
    _, trajectories, metrics = rollouts.take(4)
    assert numbers(trajectories) == [0, 2], "1 has a token of version 2, two updates old"
    assert (metrics["queue/stale_groups"], metrics["queue/lost_groups"]) == (1, 0)
    assert rollouts.num_used == 3
    assert rollouts.told == [0, 1, 2, 3, 4], "another one replaces it"


def test_a_group_counts_with_half_of_its_siblings():
    rollouts = make()
    for number, lost in ((0, 2), (1, 3), (2, 0)):
        rollouts.plays(number, lost=lost)
    _, trajectories, metrics = rollouts.take(0)
    assert numbers(trajectories) == [0, 2]
    assert metrics["queue/lost_groups"] == 1
    assert rollouts.told == [0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_where_groups_were_used_up():
    rollouts = make(num_used=9)
    for number in (9, 10):
        rollouts.plays(number, versions=(3,))
    rollouts.take(3)
    assert rollouts.told == [9, 10, 11, 12]
    assert rollouts.num_used == 11


@pytest.mark.parametrize(("kind", "expected"), [("ToolServerDown", ToolServerDown), ("SamplerDown", SamplerDown)])
def test_what_stopped_the_rollouts_stops_the_run_in_the_same_words(kind, expected):
    rollouts = make()
    rollouts._inbox.put(Loaded(0.1))
    rollouts._inbox.put(Failed(kind, "http://127.0.0.1:1 does not answer", ""))
    with pytest.raises(expected, match="http://127.0.0.1:1 does not answer"):
        rollouts.take(0)


def test_a_server_without_memory_of_any_session_stops_the_run():
    rollouts = make()
    for number in range(SIZE):
        rollouts.plays(number, lost=SIBLINGS)
    with pytest.raises(ToolServerDown, match="tool server http://127.0.0.1:1 lost all sessions of 2 groups in a row"):
        rollouts.take(0)

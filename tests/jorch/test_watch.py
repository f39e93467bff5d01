"""What is watched during RL: quantiles of log ratios against NumPy's, and alarms that speak once."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jorch
from jorch import config_io
from jorch.config import QuickstartConfig
from jorch.data.tokenizer import load_folder
from jorch.metrics import METRICS
from jorch.rl import log_ratios
from jorch.rl.alarms import Alarms
from jorch.rl.records import _log
from jorch.rl.report import rollout_metrics
from jorch.sections import WatchConfig
from jorch.types import TERMINATIONS, Completion, Group, Task, ToolCall, Trajectory, Turn


@pytest.mark.parametrize("scale", [1e-5, 0.02, 3.0])
def test_quantiles_of_counts_that_micro_batches_add_up(scale):
    rng = np.random.default_rng(0)
    nats, copies = rng.normal(0.3 * scale, scale, (4, 8, 64)), rng.integers(0, 4, (4, 8, 64))
    micro = [
        np.asarray(jax.jit(log_ratios.count)(x, w)) for x, w in zip(np.float32(nats), np.float32(copies), strict=True)
    ]
    found = log_ratios.quantiles(sum(micro))
    each = np.repeat(nats.ravel(), copies.ravel())
    assert sum(map(np.sum, micro)) == len(each)
    for name, share in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
        exact = np.quantile(each, share, method="inverted_cdf")
        assert found[f"policy/log_ratio_{name}_nats"] == pytest.approx(exact, rel=0.08, abs=1e-6)
    assert found.keys() <= METRICS.keys()


def test_what_no_bin_fits():
    counts = log_ratios.count(np.float32([-1e9, -1e-9, 0, 1e9, np.nan, np.inf]), np.ones(6, np.float32))
    assert (counts[0], counts[-1], counts.sum()) == (1, 3, 6)
    assert log_ratios.VALUES[np.flatnonzero(counts)].tolist() == [-100, 0, 100]
    assert log_ratios.quantiles(np.zeros(len(log_ratios.VALUES))) == {}
    assert log_ratios.quantiles(0.0) == {}


def ratios(low, high):
    return {"policy/log_ratio_p01_nats": low, "policy/log_ratio_p99_nats": high}


def test_an_alarm_speaks_when_it_begins_and_again_after_it_was_over():
    alarms = Alarms(WatchConfig(log_ratio_nats=0.5))
    found = [alarms.check(step, ratios(*pair)) for step, pair in enumerate([(-0.1, 0.1), (-0.6, 0), (-0.7, 0)])]
    assert found[0] == found[2] == []
    assert found[1] == [
        "step 1: log(trainer / sampler) is -0.6 at the 1st and 0 nats at the 99th percentile of the tokens, "
        "watch.log_ratio_nats is 0.5: does the sampler compute the trainer's model, with its weights?"
    ]
    assert [len(alarms.check(3 + i, ratios(0.0, high))) for i, high in enumerate([0.5, 0.6, None, 9.0])] == [0, 1, 0, 1]


def test_calls_that_collapse_are_told_from_calls_that_become_fewer():
    def begun(rates, **config):
        alarms = Alarms(WatchConfig(**config))
        return [step for step, r in enumerate(rates) if alarms.check(step, {"rollout/tool_calls_per_turn": r})]

    assert begun([1.0, 0.1]) == []  # nothing is usual yet
    assert begun([1.0] * 8 + [0.6] * 4 + [0.4] * 4) == [12]
    assert begun([1.0] * 8 + [0.4], tool_call_fraction=0.3) == []
    assert begun([1.0] * 8 + [0.0], tool_call_fraction=None) == []
    assert begun([0.0] * 20) == []


def test_a_resumed_run_remembers_what_was_usual(tmp_path, capsys):
    config = config_io.load(config_io.configs_dir() / "quickstart.yaml", QuickstartConfig).rl
    tokenizer = load_folder(Path(jorch.__file__).parent / "assets/base")

    def run(first_step, rates):
        with _log(config, tmp_path, first_step, tokenizer) as write:
            for step, rate in enumerate(rates, first_step):
                write(step, {"rollout/tool_calls_per_turn": rate}, [])
        return capsys.readouterr().out

    assert run(0, [1.0] * 6 + [0.1]).startswith("step 6: 0.1 tool calls a turn, usual were 1 ")
    assert run(7, [0.1]) == ""
    assert run(6, [0.2, 0.2]).startswith("step 6: 0.2 tool calls a turn")


def trajectory(termination, *num_calls):
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", np.zeros(1, np.int32))
    calls = tuple(ToolCall(str(i), "search", {}) for i in range(max(num_calls, default=0)))
    turns = tuple(Turn(np.zeros(1, np.int32), completion, calls[:n], ()) for n in num_calls)
    return Trajectory("t", "t/0", turns, termination, 0.0, 0, 0.0, 0.0, {})


def test_terminations_by_kind_and_calls_a_turn(task):
    present = (trajectory("answered", 2, 1, 0), trajectory("max_turns", 1), trajectory("env_error"))
    group = Group(task, present, np.zeros(3, np.float32), np.zeros(3, np.float32))
    metrics = rollout_metrics(0, [group], [*present, trajectory("infra_error"), trajectory("infra_error")])
    shares = {name: metrics[f"termination/{name}"] for name in TERMINATIONS}
    assert {name: share for name, share in shares.items() if share} == {
        "answered": 0.2,
        "max_turns": 0.2,
        "env_error": 0.2,
        "infra_error": 0.4,
    }
    assert metrics["rollout/tool_calls_per_turn"] == 1.0
    assert metrics.keys() <= METRICS.keys()


@pytest.fixture
def task():
    return Task("t", (), (), "tau2", {}, {"outcome": 1.0}, None, "airline", "train")

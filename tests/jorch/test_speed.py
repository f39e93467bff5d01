"""Speed metrics, by hand: a row whose pairs can be counted."""

import time

import jax
import numpy as np
import pytest

from jorch.data.packing import pack
from jorch.flops import PEAK_FLOPS, peak_flops, train_flops
from jorch.train.speed import Clock, speed, work_of
from jorch.types import Sample


def sample(num_tokens, first):
    token_ids = np.arange(first, first + num_tokens, dtype=np.int32)
    mask = np.arange(num_tokens) > 0
    return Sample(token_ids, mask, np.zeros(num_tokens, np.float32), 1.0)


def test_flops_count_the_pairs_that_see_each_other(tiny_config):
    """Two sequences of 5 and 3 tokens in a row of 12: 15 + 6 pairs, 8 x 12 as if dense."""
    batch = pack([sample(5, 1), sample(3, 20)], row_tokens=12, micro_rows=2, num_micro=1)
    config, seconds, peak = tiny_config(), 0.25, 1e9
    device_seconds = seconds * jax.device_count()
    causal, dense = (train_flops(config, 8, pairs) / device_seconds for pairs in (15 + 6, 8 * 12))
    assert speed(config, work_of(batch), seconds, peak) == {
        "speed/tokens_per_s_per_device": 8 / device_seconds,
        "speed/flops_per_s_per_device": causal,
        "speed/flops_per_s_per_device_dense": dense,
        "speed/mfu": causal / peak,
        "speed/mfu_dense": dense / peak,
    }


def test_siblings_share_the_work_of_their_prompt():
    """A prompt of 4 tokens and tails of 2 and 3: 10 + (5 + 6) + (5 + 6 + 7) pairs of 9 tokens."""
    prompt = np.arange(1, 5, dtype=np.int32)
    siblings = []
    for tail in ([7, 8], [9, 10, 11]):
        token_ids = np.concatenate([prompt, np.asarray(tail, np.int32)])
        mask = np.arange(len(token_ids)) >= len(prompt)
        siblings.append(Sample(token_ids, mask, np.zeros(len(token_ids), np.float32), 1.0))
    batch = pack(siblings, row_tokens=16, micro_rows=1, num_micro=2)
    assert work_of(batch) == (9, 10 + 11 + 18, 9 * 16)


def test_a_device_of_unknown_peak_has_no_mfu(tiny_config):
    """Those of the tests are CPUs."""
    batch = pack([sample(5, 1)], row_tokens=8, micro_rows=1, num_micro=1)
    assert not [name for name in speed(tiny_config(), work_of(batch), 1.0) if "mfu" in name]
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["h100"]


def test_the_parts_of_a_step_add_up():
    clock = Clock()
    with clock.part("data"):
        time.sleep(0.02)
    with clock.part("compute"):
        time.sleep(0.01)
    first, second = clock.lap(), clock.lap()
    assert first["time/data_s"] >= 0.02
    assert first["time/compute_s"] >= 0.01
    parts = sum(first[f"time/{part}_s"] for part in ("data", "compute", "host"))
    assert parts == pytest.approx(first["time/step_s"])
    assert (second["time/data_s"], second["time/compute_s"]) == (0.0, 0.0)

"""Speed metrics, by hand: a row whose pairs can be counted."""

import time

import numpy as np
import pytest

from jorch.data.packing import pack
from jorch.flops import PEAK_FLOPS, train_flops
from jorch.train.speed import Clock, speed
from jorch.types import Sample


def sample(num_tokens, first):
    token_ids = np.arange(first, first + num_tokens, dtype=np.int32)
    mask = np.arange(num_tokens) > 0
    return Sample(token_ids, mask, np.zeros(num_tokens, np.float32), 1.0)


def test_mfu_counts_the_pairs_that_see_each_other(tiny_config):
    """Two sequences of 5 and 3 tokens in a row of 12: 15 + 6 pairs, 8 x 12 as if dense."""
    batch = pack([sample(5, 1), sample(3, 20)], row_tokens=12, micro_rows=2, num_micro=1)
    config, step_s, num_devices = tiny_config(), 0.25, 4
    measured = speed(config, batch, step_s, "NVIDIA H100 80GB HBM3", num_devices)
    available = step_s * num_devices * PEAK_FLOPS["h100"]
    assert measured == {
        "speed/tokens_per_s_per_device": 8 / 0.25 / 4,
        "speed/mfu": train_flops(config, 8, 15 + 6) / available,
        "speed/mfu_dense": train_flops(config, 8, 8 * 12) / available,
    }


def test_a_device_of_unknown_peak_has_no_mfu(tiny_config):
    batch = pack([sample(5, 1)], row_tokens=8, micro_rows=1, num_micro=1)
    assert speed(tiny_config(), batch, 1.0, "cpu", 1) == {"speed/tokens_per_s_per_device": 5.0}


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

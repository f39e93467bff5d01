"""`jorch rl` with an adapter: the sampler plays the merged weights that the trainer computes with, and a run goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jorch.export import hf, pretrained
from jorch.flops import train_flops
from jorch.run_folder import read_jsonl
from jorch.sections import LoraConfig

LORA = ("lora.rank=4", "lora.targets=[q, v, down]", "algorithm.kl_coefficient=0.01", "optimizer.learning_rate=0.02")
PEAK_FLOPS = 1e12


@pytest.mark.slow
def test_reinforcement_learning_of_an_adapter(jorch: Any, world: Path) -> None:
    result = jorch.run("rl", "rl.yaml", *LORA, f"peak_flops={PEAK_FLOPS}")
    assert (result.returncode, result.stderr) == (0, "")
    rows = [row for row in read_jsonl(world / "rl" / "metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["policy/kl_nats"] > 1e-3 > abs(rows[0]["policy/kl_nats"]), "the policy has left its reference"
    # The trainer computes x W + x A B, the sampler x (W + A B); a sampler with the base alone would be off by the KL.
    assert all(row["policy/sampler_gap_nats"] < 1e-5 for row in rows)

    for row in rows:
        check_speed(row)

    model = world / "rl" / "model" / "model.safetensors"
    expected = model.read_bytes()
    assert jorch.run("export", "rl", "--out", "merged").returncode == 0
    assert (world / "merged" / "model.safetensors").read_bytes() == expected
    shutil.rmtree(world / "rl" / "checkpoints" / "4")
    shutil.rmtree(world / "rl" / "model")
    result = jorch.run("rl", "rl.yaml", *LORA, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert model.read_bytes() == expected


def check_speed(row: dict[str, float]) -> None:
    """One device: tokens of whole micro-batches of 8 x 128 positions, and the FLOPs of these tokens."""
    parts = sum(row[f"time/{part}_s"] for part in ("data", "compute", "host"))
    assert parts == pytest.approx(row["time/step_s"])
    assert row["time/data_s"] == pytest.approx(row["time/sample_s"] + row["time/tools_s"] + row["time/pack_s"])
    num_tokens = row["speed/tokens_per_s_per_device"] * row["time/learn_s"]
    num_micro = num_tokens / (8 * 128 * row["packing/fill"])
    assert num_micro == pytest.approx(round(num_micro))
    config = hf.load_config(pretrained.BASE)
    lora = LoraConfig(rank=4, targets=("q", "v", "down"))
    dense = train_flops(config, num_tokens, num_tokens * 128, lora)
    assert row["speed/flops_per_s_per_device_dense"] * row["time/learn_s"] == pytest.approx(dense)
    causal = row["speed/flops_per_s_per_device"] * row["time/learn_s"]
    assert train_flops(config, num_tokens, num_tokens, lora) < causal < dense
    assert row["speed/mfu"] == pytest.approx(row["speed/flops_per_s_per_device"] / PEAK_FLOPS)
    assert row["speed/mfu_dense"] == pytest.approx(row["speed/flops_per_s_per_device_dense"] / PEAK_FLOPS)


def test_mistakes(main: Callable[..., str]) -> None:
    line = main(2, "rl", "rl.yaml", "mesh.context=3")
    assert "mesh.context=3 cannot split batch.row_tokens=128: it must be a multiple of 24, best of 768" in line
    assert "optimizer.kind=muon is for whole matrices" in main(2, "rl", "rl.yaml", "lora={}", "optimizer.kind=muon")
    assert "lora.targets" in main(2, "rl", "rl.yaml", "lora.targets=[query]")

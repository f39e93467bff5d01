"""`jorch rl` with an adapter: the sampler plays the merged weights that the trainer computes with, and a run goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jorch.run_folder import read_jsonl

LORA = ("lora.rank=4", "lora.targets=[q, v, down]", "algorithm.kl_coefficient=0.01", "optimizer.learning_rate=0.02")


@pytest.mark.slow
def test_reinforcement_learning_of_an_adapter(jorch: Any, world: Path) -> None:
    result = jorch.run("rl", "rl.yaml", *LORA)
    assert (result.returncode, result.stderr) == (0, "")
    rows = [row for row in read_jsonl(world / "rl" / "metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["policy/kl_nats"] > 1e-3 > abs(rows[0]["policy/kl_nats"]), "the policy has left its reference"
    # The trainer computes x W + x A B, the sampler x (W + A B); a sampler with the base alone would be off by the KL.
    assert all(row["policy/sampler_gap_nats"] < 1e-5 for row in rows)

    model = world / "rl" / "model" / "model.safetensors"
    expected = model.read_bytes()
    assert jorch.run("export", "rl", "--out", "merged").returncode == 0
    assert (world / "merged" / "model.safetensors").read_bytes() == expected
    shutil.rmtree(world / "rl" / "checkpoints" / "4")
    shutil.rmtree(world / "rl" / "model")
    result = jorch.run("rl", "rl.yaml", *LORA, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert model.read_bytes() == expected


def test_mistakes(main: Callable[..., str]) -> None:
    line = main(2, "rl", "rl.yaml", "mesh.context=3")
    assert "mesh.context=3 cannot split batch.row_tokens=128: it must be a multiple of 24, best of 768" in line
    assert "optimizer.kind=muon is for whole matrices" in main(2, "rl", "rl.yaml", "lora={}", "optimizer.kind=muon")
    assert "lora.targets" in main(2, "rl", "rl.yaml", "lora.targets=[query]")

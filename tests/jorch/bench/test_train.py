"""The benchmark's two steps compute the same, and its numbers are those that its formula gives."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jorch import cli
from jorch.bench.train import jax_causal_rows, jax_rows
from jorch.flops import PEAK_FLOPS, train_flops
from jorch.model.attention import packed_rows
from jorch.sections import LoraConfig, ModelConfig
from kernels.shapes import MASKS


@pytest.mark.parametrize(
    ("mask", "theirs"), [("packed", jax_rows), ("shared-prompt", jax_rows), ("causal", jax_causal_rows)]
)
def test_both_attentions_compute_the_same(mask, theirs):
    T, N, K, H = 48, 4, 2, 8
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, n, H)), jnp.float32) for n in (N, K, K))
    end = jnp.tile(jnp.asarray(MASKS[mask](T)), (2, 1))
    ours, baseline = (rows(end, H, None).attend(q, k, v) for rows in (packed_rows, theirs))
    np.testing.assert_allclose(ours, baseline, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_case_is_printed_and_follows_from_the_formula(tmp_path, capsys, monkeypatch):
    """Rows of 64 tokens, packed ones of 4, 24, 7, 13, 5 and 11, as if this were an H100."""
    monkeypatch.setattr("jorch.bench.train.peak_flops", lambda kind: PEAK_FLOPS["h100"])
    path = tmp_path / "train.json"
    assert cli.main(["bench", "train", "--tokens", "64", "--layers", "1", "--lora", "--json", str(path)]) == 0
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert printed.startswith("no accelerator here: small shapes on the CPU")
    config, adapter = ModelConfig(**written["model"]), LoraConfig(**written["lora"])
    assert config.num_hidden_layers == 1
    cases = [(t["row_tokens"], t["rows"], t["attention"]) for t in written["timings"]]
    assert len(set(cases)) == len(cases) == 4
    lengths = {"one sequence": [64], "packed": [4, 24, 7, 13, 5, 11]}
    for t in written["timings"]:
        assert 0 < t["q25_s"] <= t["median_s"] <= t["q75_s"]
        assert t["tokens_per_s"] == pytest.approx(64 / t["median_s"])
        assert f"{t['tokens_per_s']:,.0f}" in printed
        available = t["median_s"] * PEAK_FLOPS["h100"]
        pairs = sum(n * (n + 1) / 2 for n in lengths[t["rows"]])
        assert t["flops_per_s"] * t["median_s"] == pytest.approx(train_flops(config, 64, pairs, adapter))
        assert t["flops_per_s_dense"] * t["median_s"] == pytest.approx(train_flops(config, 64, 64 * 64, adapter))
        assert t["mfu"] == pytest.approx(train_flops(config, 64, pairs, adapter) / available)
        assert t["mfu_dense"] == pytest.approx(train_flops(config, 64, 64 * 64, adapter) / available)
    for ours, theirs in zip(written["timings"][::2], written["timings"][1::2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_more_layers_than_the_model_has_are_refused(capsys):
    assert cli.main(["bench", "train", "--layers", "37"]) == 2
    assert "--layers 37: Qwen3-8B has 36" in capsys.readouterr().err

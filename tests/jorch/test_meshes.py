"""Three train steps over packed rows on simulated devices: the same loss and parameters as on one device."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EIGHT_DEVICES = """
import math
import sys
from functools import partial
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jorch.sections import AlgorithmConfig, LoraConfig, ModelConfig, OptimizerConfig
from jorch.data.packing import pack
from jorch.export.probe import make_probe_fn
from jorch.model import lora
from jorch.model.transformer import Qwen3
from jorch.rl.losses import policy_loss
from jorch.sharding import MESH_AXES, shard_batch
from jorch.train.optimizer import make_optimizer
from jorch.train.sft import cross_entropy
from jorch.train.state import init_state
from jorch.train.step import make_train_step
from jorch.types import Sample

assert jax.device_count() == 8
base = Qwen3(ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=8, tie_word_embeddings=True))
sequence = AlgorithmConfig(ratio="sequence", aggregation="sequence_mean", entropy_coefficient=0.01,
                           kl_coefficient=0.1, importance_cap=2.0)
rl = partial(policy_loss, config=sequence, on_policy=False)
# name -> (optimizer, loss, with entropy, adapter)
kinds = {"rl": ("adam", rl, True, None), "sft": ("adam", cross_entropy, False, None),
         "muon": ("muon", cross_entropy, False, None), "adafactor": ("adafactor", cross_entropy, False, None),
         "lora": ("adam", cross_entropy, False, LoraConfig(rank=4))}
rng = np.random.default_rng(0)

def draw(path, x):
    return ((1 if path[-1].key.endswith("norm") else 0) + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

whole = jax.tree_util.tree_map_with_path(draw, base.abstract_params())
adapter = jax.tree_util.tree_map_with_path(draw, lora.LoraQwen3(base, LoraConfig(rank=4)).abstract_params())

def batch_of(step):
    rng = np.random.default_rng(step)
    samples = []
    for i in range(36):
        prompt = np.arange(i // 3, i // 3 + 20)
        token_ids = np.concatenate([prompt, rng.integers(0, 64, rng.integers(5, 30))]).astype(np.int32)
        mask = np.arange(len(token_ids)) >= 20
        logprobs = np.where(mask, rng.uniform(-5, -3, len(mask)), 0).astype(np.float32)
        samples.append(Sample(token_ids, mask, logprobs, float(rng.normal()), 1 + i % 2))
    batch = pack(samples, row_tokens=64, micro_rows=8, num_micro=4)
    assert (batch.loss_weights > 0).any((1, 2)).sum() > 1, "one micro-batch holds everything"
    assert batch.segment_ids.max() > 3, "no row holds several families"
    shift = rng.normal(0, 0.3, batch.old_logprobs.shape).astype(np.float32)
    return batch._replace(old_logprobs=batch.old_logprobs + shift, ref_logprobs=batch.old_logprobs - shift)

for run in sys.argv[2:]:
    name, *shape = run.split("-")
    shape = tuple(map(int, shape))
    devices = jax.devices()[:math.prod(shape)]
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    kind, loss_fn, with_entropy, low_rank = kinds[name]
    model = lora.LoraQwen3(base, low_rank) if low_rank else base
    params = jax.tree.map(jax.device_put, adapter if low_rank else whole, model.shardings(mesh))
    frozen = jax.tree.map(jax.device_put, whole, base.shardings(mesh)) if low_rank else None
    optimizer = make_optimizer(OptimizerConfig(kind=kind, learning_rate=1e-3), steps=3)
    train_step = make_train_step(model, optimizer, loss_fn, mesh, with_entropy=with_entropy)
    state = init_state(model, optimizer, mesh, params)
    for leaf in jax.tree.leaves(state):  # nothing big lies whole on every device
        if leaf.size > 600:
            assert leaf.addressable_shards[0].data.size == leaf.size / shape[1] / shape[3], leaf.sharding
    values = {}
    for step in range(3):
        state, metrics = train_step(state, shard_batch(mesh, batch_of(step)), 54.0, frozen)
        values |= {f"metric/{step}/{name}": np.asarray(x) for name, x in metrics.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.merge(state.params, frozen)):
        values["param/" + jax.tree_util.keystr(path)] = np.asarray(leaf)
    if low_rank:
        values["param/probe"] = np.array(make_probe_fn(base.config, low_rank, mesh)(state.params, frozen).logprobs)
    np.savez(Path(sys.argv[1]) / f"{run}.npz", **values)
    jax.clear_caches()
"""
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ONE = "1-1-1-1"
COMBINATIONS = [
    f"1-{fsdp}-{context}-{tensor}"
    for fsdp, context, tensor in itertools.product((1, 2, 4, 8), repeat=3)
    if 1 < fsdp * context * tensor <= 8
]
"""Every way to lay 2, 4 and 8 devices over fsdp, context and tensor; data is 1."""


def compare_with_one_device(folder: Path, runs: list[str]) -> None:
    """`runs` are KIND-data-fsdp-context-tensor; all of them in one process."""
    kinds = dict.fromkeys(run.split("-")[0] for run in runs)
    command = [sys.executable, "-c", EIGHT_DEVICES, str(folder), *(f"{kind}-{ONE}" for kind in kinds), *runs]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILES}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for run in runs:
        expected, got = np.load(folder / f"{run.split('-')[0]}-{ONE}.npz"), np.load(folder / f"{run}.npz")
        assert float(expected["metric/0/train/loss"]) != float(expected["metric/2/train/loss"])
        assert set(got) == set(expected)
        for name in expected:
            # Metrics: float32 sums in another order, over three steps. Parameters: Adam divides by the gradient's own
            # size; where that is all rounding, a step of 1e-3 keeps some of it.
            rtol, atol = (1e-4, 1e-6) if name.startswith("metric/") else (0, 1e-5)
            np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=atol, err_msg=f"{name} of {run}")


def test_eight_devices_compute_what_one_does(tmp_path):
    """Shards of parameters, rows, heads and of the sequence together, with a ratio that spans a sequence."""
    compare_with_one_device(tmp_path, ["rl-1-2-2-2"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_combination_of_axes_computes_what_one_device_does(tmp_path):
    assert len(COMBINATIONS) == 3 + 6 + 10
    compare_with_one_device(tmp_path, [f"sft-{shape}" for shape in COMBINATIONS])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_other_optimizers_and_adapters(tmp_path):
    compare_with_one_device(tmp_path, ["muon-1-2-2-2", "adafactor-2-2-1-2", "lora-1-2-2-2"])

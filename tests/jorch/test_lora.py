"""An adapter against the model with its product written into the matrices, against the full gradient, against PEFT."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jorch import cli
from jorch.config import SftConfig
from jorch.data.packing import pack
from jorch.export import adapter, hf, pretrained, probe
from jorch.export.source import Held
from jorch.flops import adapter_params, train_flops
from jorch.model import lora
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3
from jorch.sections import LoraConfig, OptimizerConfig
from jorch.sharding import shard_batch
from jorch.synth import sft
from jorch.train.optimizer import make_optimizer
from jorch.train.sft import cross_entropy
from jorch.train.state import abstract_state, init_state
from jorch.train.step import make_logprobs_fn, make_train_step
from jorch.types import Sample

ALL = LoraConfig(rank=3, alpha=5.0)
SCALE = ALL.alpha / ALL.rank
NUM_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
# Two layers of float32 sums of up to 64 terms of size about 1, each rounded to 6e-8 of itself.
ATOL = 2e-5
TOKEN_IDS = np.random.default_rng(0).integers(0, 64, 20).astype(np.int32)


def random_adapter(model, seed=1):
    """One in which B matters as well."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), model.abstract_params())


def logits_of(model, params, frozen=None, token_ids=TOKEN_IDS):
    """Logits [n, V] of one sequence."""
    n = len(token_ids)

    @jax.jit
    def run(params, frozen):
        module = model.bind(params, frozen)
        return module.logits(module.hidden(jnp.asarray(token_ids)[None], jnp.arange(n)[None], jnp.full((1, n), n)))[0]

    return np.asarray(run(params, frozen))


def merged_by_hand(params, frozen):
    """The matrices with (alpha / rank) A B added, in float64."""
    layers = {name: np.asarray(x, np.float64) for name, x in frozen["layers"].items()}
    for name, pair in params["layers"]["adapter"].items():
        products = [np.tensordot(np.float64(a), np.float64(b), 1) for a, b in zip(pair["a"], pair["b"], strict=True)]
        layers[name] = layers[name] + SCALE * np.stack(products)
    return frozen | {"layers": layers}


def test_base_with_adapter_is_the_merged_model(tiny, qwen3_logits):
    base, frozen = tiny
    model = LoraQwen3(base, ALL)
    params = random_adapter(model)
    expected = qwen3_logits(merged_by_hand(params, frozen), base.config, TOKEN_IDS)
    assert np.abs(expected - qwen3_logits(frozen, base.config, TOKEN_IDS)).max() > 0.5, "the adapter does nothing"
    tolerance = ATOL * np.abs(expected).max()
    np.testing.assert_allclose(logits_of(model, params, frozen), expected, rtol=0, atol=tolerance)
    merged = model.merge(params, frozen)
    np.testing.assert_allclose(logits_of(base, merged), expected, rtol=0, atol=tolerance)
    assert merged["embed"] is frozen["embed"], "what has no adapter is not copied"


@pytest.mark.slow
def test_an_adapter_of_full_rank_reaches_every_model(tiny, random_params):
    """Factors of the difference to another model's matrices give that model."""
    base, frozen = tiny
    other = random_params(base, seed=7)
    full = LoraConfig(rank=32, alpha=32.0)

    def factors(name):
        difference = np.asarray(other["layers"][name] - frozen["layers"][name], np.float64)
        inputs, outputs = difference.shape[1 : 1 + NUM_INPUTS[name]], difference.shape[1 + NUM_INPUTS[name] :]
        u, s, v = np.linalg.svd(difference.reshape(2, np.prod(inputs), -1), full_matrices=False)
        spare = ((0, 0), (0, 0), (0, full.rank - s.shape[-1]))
        a = np.pad(u * s[:, None, :], spare).reshape(2, *inputs, full.rank)
        b = np.pad(v.swapaxes(1, 2), spare).swapaxes(1, 2).reshape(2, full.rank, *outputs)
        return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}

    matrices = {name: other["layers"][name] for name in NUM_INPUTS}
    expected = logits_of(base, frozen | {"layers": frozen["layers"] | matrices})
    params = {"layers": {"adapter": {name: factors(name) for name in NUM_INPUTS}}}
    reached = logits_of(LoraQwen3(base, full), params, frozen)
    # The base's part of every product, and its rounding, cancels.
    np.testing.assert_allclose(reached, expected, rtol=0, atol=5 * ATOL * np.abs(expected).max())


def make_batch(num_micro=2):
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(4):
        token_ids = rng.integers(0, 64, 14).astype(np.int32)
        samples.append(Sample(token_ids, np.arange(14) > 3, np.zeros(14, np.float32), 1.0))
    return pack(samples, row_tokens=16, micro_rows=4 // num_micro, num_micro=num_micro)


def sgd_gradient(model, params, frozen, mesh, batch):
    """The gradient of a step, as its update at learning rate 1."""
    optimizer = optax.sgd(1.0)
    step = make_train_step(model, optimizer, cross_entropy, mesh)
    state, _ = step(init_state(model, optimizer, mesh, params), shard_batch(mesh, batch), 4.0, frozen)
    return jax.tree.map(lambda old, new: np.asarray(old, np.float64) - np.asarray(new), params, state.params)


@pytest.mark.slow
def test_the_gradient_is_the_full_gradient_through_the_product(tiny, mesh):
    """dA = s dW B^T and dB = s A^T dW, with dW from training the merged model whole; the base gets none."""
    base, frozen = tiny
    model = LoraQwen3(base, ALL)
    params = random_adapter(model)
    before = jax.tree.map(np.asarray, frozen)
    got = sgd_gradient(model, params, frozen, mesh, make_batch())
    full = sgd_gradient(base, model.merge(params, frozen), None, mesh, make_batch())
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert jax.tree.structure(got) == jax.tree.structure(model.abstract_params())
    scale = max(np.abs(x).max() for x in jax.tree.leaves(full["layers"]))
    for name, pair in got["layers"]["adapter"].items():
        for layer in range(2):
            dw = full["layers"][name][layer].reshape(np.prod(pair["a"].shape[1:-1]), -1)
            a, b = (np.asarray(params["layers"]["adapter"][name][k][layer], np.float64) for k in "ab")
            da, db = SCALE * dw @ b.reshape(3, -1).T, SCALE * a.reshape(-1, 3).T @ dw
            np.testing.assert_allclose(pair["a"][layer].reshape(da.shape), da, rtol=0, atol=5e-5 * scale)
            np.testing.assert_allclose(pair["b"][layer].reshape(db.shape), db, rtol=0, atol=5e-5 * scale)
            assert np.abs(da).max() > 1e-3 * scale


def test_the_state_knows_of_the_adapter_only(tiny, mesh):
    base, _ = tiny
    model, optimizer = LoraQwen3(base, ALL), make_optimizer(OptimizerConfig(learning_rate=1e-3), 10)
    state = abstract_state(model, optimizer, mesh)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == adapter_params(base.config, ALL)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * adapter_params(base.config, ALL)


@pytest.mark.slow
def test_the_number_of_micro_batches_changes_nothing(tiny, mesh):
    base, frozen = tiny
    model = LoraQwen3(base, ALL)
    params = random_adapter(model)
    one, four = (sgd_gradient(model, params, frozen, mesh, make_batch(num)) for num in (1, 4))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale), one, four)


@pytest.mark.slow
def test_training_begins_at_the_base(tiny, mesh):
    """Which is what the KL penalty of RL refers to."""
    base, frozen = tiny
    start = lora.start(base, frozen, ALL, 0, mesh)
    batch = make_batch()
    at_start, of_base = (
        make_logprobs_fn(start.model)(start.params, batch, frozen),
        make_logprobs_fn(base)(frozen, batch),
    )
    # The same operations, which XLA may fuse differently.
    np.testing.assert_allclose(at_start, of_base, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_bfloat16_base_keeps_its_type_and_its_adapter_float32(tiny_config, random_params):
    base = Qwen3(tiny_config(param_dtype="bfloat16", compute_dtype="bfloat16"))
    frozen, model = random_params(base), LoraQwen3(base, ALL)
    params = random_adapter(model)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    merged = model.merge(params, frozen)
    assert {str(x.dtype) for x in jax.tree.leaves(merged)} == {"bfloat16"}
    low, high = logits_of(model, params, frozen), logits_of(base, merged)
    # Some dozen roundings to 8 bits along the residual stream.
    np.testing.assert_allclose(low, high, rtol=0, atol=2**-4 * np.abs(high).max())


def test_flops_leave_out_the_gradient_of_what_is_frozen(tiny_config):
    """By hand for q alone: D 16, N x H 32, rank 3, 2 layers."""
    config, one = tiny_config(), LoraConfig(rank=3, targets=("q",))
    assert adapter_params(config, one) == 2 * 3 * (16 + 32)
    whole = train_flops(config, 10, 7)
    pairs = train_flops(config, 0, 7)
    assert train_flops(config, 10, 7, one) == pairs + (whole - pairs) * 4 / 6 + 6 * 10 * 288


# Runs, exports and other people's readers.

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "o", "gate", "down"))
DIALOGUES = [
    [{"role": "user", "content": f"Wie heisst Nummer {i}?"}, {"role": "assistant", "content": f"Sie heisst {i}."}]
    for i in range(8)
]


def run_config(folder: Path, **changes) -> SftConfig:
    settings = {
        "out": str(folder / "run"),
        "init_from": str(folder / "base"),
        "demonstrations": str(folder / "demo.jsonl"),
        "steps": 6,
        "rows_per_step": 8,
        "batch": {"row_tokens": 96, "micro_rows": 8},
        "lora": LORA.model_dump(),
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every_steps": 3, "keep": 2},
        "log_every": 1,
    }
    return SftConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `run`, an adapter of the base that was trained with SFT, and its exports."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "demo.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in DIALOGUES))
    shutil.copytree(pretrained.BASE, folder / "base")
    sft.run(run_config(folder), resume=False, fresh=False)
    for kind in ("merged", "adapter"):
        assert cli.main(["export", str(folder / "run"), "--out", str(folder / kind), "--lora", kind]) == 0
    return folder


@pytest.mark.slow
def test_a_run_trains_an_adapter_and_exports_both(trained, mesh):
    loss = [json.loads(line)["train/loss"] for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert loss[-1] < 0.7 * loss[0]
    base, model = pretrained.load("base", mesh), pretrained.load(str(trained / "run" / "model"), mesh)
    changed = {
        name
        for name, x in model.params["layers"].items()
        if not np.array_equal(x, np.asarray(base.params["layers"][name]))
    }
    assert changed == set(LORA.targets)
    np.testing.assert_array_equal(model.params["embed"], base.params["embed"])
    for name in ("model.safetensors", "config.json"):
        assert (trained / "merged" / name).read_bytes() == (trained / "run" / "model" / name).read_bytes()


@pytest.mark.slow
def test_an_exported_adapter_says_what_it_is_of_and_what_to_expect(trained, mesh):
    """The probe is that of the base with the adapter, whether they are merged or not."""
    merged, alone = (json.loads((trained / kind / probe.FILE).read_text()) for kind in ("merged", "adapter"))
    assert alone.keys() == {"step", "source_digest", "tokenizer_digest", "probe"}
    assert (alone["step"], alone | {"probe": None}) == (6, merged | {"probe": None})
    assert alone["probe"]["token_ids"] == merged["probe"]["token_ids"]
    np.testing.assert_allclose(alone["probe"]["logprobs"], merged["probe"]["logprobs"], atol=1e-5)
    base = pretrained.load("base", mesh)
    frozen = probe.make_probe(base.model.config, Held(base.params))
    assert np.abs(np.subtract(frozen.logprobs, alone["probe"]["logprobs"])).max() > 0.1


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_not_the_base(trained, mesh):
    """Three numbers a parameter of the adapter, and what Orbax writes around them."""
    state = trained / "run" / "checkpoints" / "6" / "state"
    held = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    base = pretrained.load("base", mesh)
    assert 4 * 3 * adapter_params(base.model.config, LORA) < 4 * base.model.num_params()
    assert held < 4 * base.model.num_params()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_adapter(trained):
    """From the checkpoint of step 3, as if the run had been cut short."""
    weights = trained / "run" / "model" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    shutil.rmtree(trained / "run" / "checkpoints" / "6")
    sft.run(run_config(trained), resume=True, fresh=False)
    assert weights.read_bytes() == expected


@pytest.mark.slow
def test_other_weights_under_the_adapter_are_refused(trained, tmp_path, mesh, capsys):
    """The base has changed where the run says that it is."""
    start = pretrained.load("base", mesh)
    params = start.params | {"final_norm": start.params["final_norm"] * 1.01}
    (trained / "base").rename(tmp_path / "base")
    try:
        hf.save(trained / "base", start.model.config, params, start.tokenizer)
        assert cli.main(["export", str(trained / "run"), "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert f"init_from='{trained / 'base'}' holds other weights than those the adapter was trained on" in line
        with pytest.raises(ValueError, match="holds other weights"):
            sft.run(run_config(trained), resume=True, fresh=False)
        assert not (tmp_path / "out").exists()
    finally:
        shutil.rmtree(trained / "base")
        (tmp_path / "base").rename(trained / "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--lora", "adapter", "--widen-heads"], "--widen-heads changes the base; it goes with --lora merged only"),
        (["--lora", "adapter", "--dtype", "bf16"], "--dtype bfloat16: adapters stay in the type they were trained in"),
        (["--lora", "both"], "argument --lora: invalid choice: 'both' (choose from"),
    ],
)
def test_what_an_export_of_an_adapter_refuses(arguments, line, trained, tmp_path, capsys):
    assert cli.main(["export", str(trained / "run"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer": {"kind": "muon", "learning_rate": 1e-3}}, "optimizer.kind=muon is for whole matrices"),
        ({"init_from": None, "model": {}}, "init_from is null; lora adapts trained weights"),
        ({"lora": {"targets": ["query"]}}, "Input should be 'q', 'k', 'v', 'o', 'gate', 'up' or 'down'"),
        ({"lora": {"targets": []}}, "at least 1 item"),
        ({"lora": {"rank": 0}}, "greater than 0"),
    ],
)
def test_configs_that_are_refused(changes, line, tmp_path, tiny_config):
    if "model" in changes:
        changes = changes | {"model": tiny_config().model_dump()}
    with pytest.raises(ValueError, match=line):
        run_config(tmp_path, **changes)


@pytest.mark.slow
def test_the_adapters_files_are_pefts(trained):
    """Names, shapes and values: (alpha / rank) B A is what the merged matrices have more than the base."""
    tensors = load_file(trained / "adapter" / adapter.WEIGHTS)
    description = json.loads((trained / "adapter" / adapter.CONFIG).read_text())
    wanted = ["down_proj", "gate_proj", "o_proj", "q_proj", "v_proj"]
    assert (description["peft_type"], description["r"], description["lora_alpha"]) == ("LORA", 4, 8.0)
    assert description["target_modules"] == wanted
    assert description["base_model_name_or_path"] == str(trained / "base")
    merged, base = (load_file(folder / "model.safetensors") for folder in (trained / "merged", pretrained.BASE))
    assert len(tensors) == 2 * 4 * len(wanted)
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        matrix = name.removeprefix("base_model.model.").replace("lora_A.", "")
        np.testing.assert_allclose(2.0 * b @ a, merged[matrix] - base[matrix], rtol=0, atol=1e-6)


PEFT = """
import sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, token_ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    np.save(out, model(torch.from_numpy(np.load(token_ids))[None]).logits[0].numpy())
"""


@pytest.mark.slow
def test_peft_computes_the_same(trained, tmp_path, mesh):
    python = os.environ.get("JORCH_HF_PYTHON", sys.executable)
    check = subprocess.run([python, "-c", "import torch, transformers, peft"], cwd="/", capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"{python} lacks peft, torch or transformers: JORCH_HF_PYTHON")
    token_ids = np.random.default_rng(0).integers(0, 640, 30)
    np.save(tmp_path / "ids.npy", token_ids)
    paths = [pretrained.BASE, trained / "adapter", tmp_path / "ids.npy", tmp_path / "logits.npy"]
    done = subprocess.run([python, "-c", PEFT, *map(str, paths)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = pretrained.load(str(trained / "merged"), mesh)
    ours, theirs = logits_of(model.model, model.params, token_ids=token_ids), np.load(tmp_path / "logits.npy")
    start = pretrained.load("base", mesh)
    assert np.abs(theirs - logits_of(start.model, start.params, token_ids=token_ids)).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)

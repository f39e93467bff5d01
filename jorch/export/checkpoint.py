"""`jorch export`: a checkpoint of a run as a folder of Hugging Face safetensors, or its adapter as PEFT's."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jorch import config_io
from jorch.checkpoint import Checkpoints, check_base_sums, describe
from jorch.config import QuickstartConfig, RlConfig, SftConfig
from jorch.data import tokenizer as tokenizers
from jorch.data.tokenizer import Tokenizer
from jorch.export import adapter, heads, hf, pretrained, weights
from jorch.export.importing import refuse_occupied
from jorch.export.probe import make_probe
from jorch.export.source import Cast, Held, Merged, OfRun, Source, checksums_of, flat_adapter
from jorch.memory import give_back_freed_blocks
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3, Trainable
from jorch.run_folder import CONFIG
from jorch.sections import MeshConfig, ModelConfig
from jorch.sharding import make_mesh
from jorch.train.optimizer import make_optimizer
from jorch.train.state import abstract_state

Lora = Literal["merged", "adapter"]


class Form(NamedTuple):
    """In which form parameters leave."""

    widen_heads: bool
    dtype: str | None
    """None: as they are."""


def run(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    widen_heads: bool = False,
    lora: Lora | None = None,
    dtype: str | None = None,
) -> None:
    """Export run folder `source`, or what `jorch import` wrote, to `out`, with its tokenizer and the probe.

    A run may be under way. `step` names one of its checkpoints; None means the newest. `lora` is for runs that train
    an adapter: added to its base (also where it is None), or the adapter alone. `dtype` is of the exported parameters,
    None means as they are; the probe is of those that are exported, an adapter's together with its base.

    Raises ValueError where `source` is no training run, has no such checkpoint or no adapter, where the adapter's base
    is gone or another one, or `out` is not empty.
    """
    give_back_freed_blocks()
    form = Form(widen_heads, dtype)
    if weights.is_checkpoint(source):
        if step is not None:
            raise ValueError(f"{source} is no training run, so it has no --step")
        if lora is not None:
            raise ValueError(f"--lora {lora}: {source} is a whole model, without an adapter; leave --lora out")
        _export_weights(source, out, form)
        return
    config = _training_config(source)
    if lora is not None and config.lora is None:
        raise ValueError(f"--lora {lora}: {source} trains the whole model, without an adapter; leave --lora out")
    if lora == "adapter" and widen_heads:
        raise ValueError("--widen-heads changes the base; it goes with --lora merged only")
    if lora == "adapter" and dtype is not None:
        raise ValueError(f"--dtype {dtype}: adapters stay in the type they were trained in; it goes with --lora merged")
    refuse_occupied(out)
    folder, architecture = source / "checkpoints", source / hf.ARCHITECTURE
    if not folder.is_dir() or not architecture.is_dir():
        raise ValueError(f"{source} has no checkpoint yet")
    base = Qwen3(hf.load_config(architecture, param_dtype=_param_dtype(config)))
    tokenizer = tokenizers.load_folder(architecture)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(folder, config.checkpoint, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise ValueError(f"{source} has no checkpoint yet")
        belongs_to = describe(config, base.config, tokenizer.digest)
        model: Trainable = LoraQwen3(base, config.lora) if config.lora else base
        with ExitStack() as stack:
            arrays, meta, step = checkpoints.open(belongs_to, step)
            if arrays is None:
                wanted = abstract_state(model, optimizer, make_mesh(MeshConfig()))
                state, meta, step = checkpoints.restore(wanted, belongs_to, step)
                trained: Source = Held(flat_adapter(state.params) if config.lora else state.params)
            else:
                stack.enter_context(arrays.kept(source))
                shapes = model.abstract_params()
                trained = OfRun(arrays, flat_adapter(shapes) if config.lora else shapes)
            params = trained
            if isinstance(model, LoraQwen3):
                frozen = stack.enter_context(_frozen(meta, _param_dtype(config)))
                params = Merged(frozen, trained, model)
            facts = {"step": step} | _facts(params, tokenizer)
            if config.lora and lora == "adapter":
                where, expected = str(pretrained.folder_of(meta["base"]["init_from"])), make_probe(base.config, params)
                adapter.save(out, config.lora, trained, where, expected, facts)
                print(f"exported the adapter of step {step} of {source} to {out}")
                return
            _write(out, base.config, params, tokenizer, form, facts)
    print(f"exported step {step} of {source} to {out}")


def _write(
    out: Path, config: ModelConfig, params: Source, tokenizer: Tokenizer, form: Form, facts: dict[str, Any]
) -> None:
    if form.widen_heads:
        config, params = heads.widen(config, params)
    if form.dtype is not None:
        config, params = config.model_copy(update={"param_dtype": form.dtype}), Cast(params, form.dtype)
    hf.write(out, config, params, tokenizer, facts)


def _facts(params: Source, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of what is exported. The source's is the SHA-256 of the checksums of the parameters as they lie in the
    checkpoint, an adapter's added to its base: the same whatever form they leave in.
    """
    sums = json.dumps(checksums_of(params), sort_keys=True)
    return {"source_digest": hashlib.sha256(sums.encode()).hexdigest(), "tokenizer_digest": tokenizer.digest}


@contextmanager
def _frozen(meta: dict[str, Any], param_dtype: str) -> Iterator[Source]:
    """The base that the adapter of a checkpoint was trained on; it is read once before anything is written."""
    init_from = meta["base"]["init_from"]
    with pretrained.opened(init_from, param_dtype=param_dtype) as base:
        check_base_sums(meta, init_from, checksums_of(base))
        yield base


def _export_weights(source: Path, out: Path, form: Form) -> None:
    refuse_occupied(out)
    raw = hf.stored_config(source / hf.ARCHITECTURE)
    model, tokenizer = pretrained.load_model(source, param_dtype=raw["torch_dtype"])
    params = weights.Stored(source, model, make_mesh(MeshConfig()))
    _write(out, model.config, params, tokenizer, form, _facts(params, tokenizer))
    print(f"exported {source} to {out}")


def _param_dtype(config: RlConfig | SftConfig) -> str:
    if isinstance(config, RlConfig):
        return config.param_dtype
    return config.model.param_dtype if config.model else "float32"


def _training_config(source: Path) -> RlConfig | SftConfig:
    path = source / CONFIG
    if not path.is_file():
        raise ValueError(f"{source} is no run folder: it has no {CONFIG}")
    keys = config_io.read_mapping(path)
    if "rl" in keys:
        return config_io.load(path, QuickstartConfig).rl
    if "tasks_per_step" in keys:
        return config_io.load(path, RlConfig)
    if "demonstrations" in keys:
        return config_io.load(path, SftConfig)
    raise ValueError(f"{source} holds no training run (no SFT, RL or quickstart), so no model to export")

"""`jorch export`: a checkpoint of a run as a folder of Hugging Face safetensors."""

from pathlib import Path

from jorch import config_io
from jorch.checkpoint import Checkpoints, describe
from jorch.config import MeshConfig, QuickstartConfig, RlConfig, SftConfig
from jorch.data import tokenizer as tokenizers
from jorch.export import heads, hf, pretrained, weights
from jorch.export.importing import refuse_occupied
from jorch.export.source import Held
from jorch.model.transformer import Qwen3
from jorch.run_folder import CONFIG
from jorch.sharding import make_mesh
from jorch.train.optimizer import make_optimizer
from jorch.train.state import abstract_state


def run(source: Path, out: Path, *, step: int | None = None, widen_heads: bool = False) -> None:
    """Export run folder `source`, or what `jorch import` wrote, to `out`, with its tokenizer and the probe.

    A run may be under way. `step` names one of its checkpoints; None means the newest.

    Raises ValueError where `source` is no training run, has no such checkpoint, or `out` is not empty.
    """
    if weights.is_checkpoint(source):
        if step is not None:
            raise ValueError(f"{source} is no training run, so it has no --step")
        _export_weights(source, out, widen_heads)
        return
    config = _training_config(source)
    refuse_occupied(out)
    folder, architecture = source / "checkpoints", source / hf.ARCHITECTURE
    if not folder.is_dir() or not architecture.is_dir():
        raise ValueError(f"{source} has no checkpoint yet")
    model = Qwen3(hf.load_config(architecture, param_dtype=_param_dtype(config)))
    tokenizer = tokenizers.load_folder(architecture)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(folder, config.checkpoint, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise ValueError(f"{source} has no checkpoint yet")
        wanted = abstract_state(model, optimizer, make_mesh(MeshConfig()))
        state, _, step = checkpoints.restore(wanted, describe(config, model.config, tokenizer.digest), step)
    held = Held(state.params)
    exported = heads.widen(model.config, held) if widen_heads else (model.config, held)
    hf.write(out, *exported, tokenizer, {"step": step, "tokenizer_digest": tokenizer.digest})
    print(f"exported step {step} of {source} to {out}")


def _export_weights(source: Path, out: Path, widen_heads: bool) -> None:
    refuse_occupied(out)
    raw = hf.stored_config(source / hf.ARCHITECTURE)
    model, tokenizer = pretrained.load_model(source, param_dtype=raw["torch_dtype"])
    stored = weights.Stored(source, model, make_mesh(MeshConfig()))
    wanted = heads.widen(model.config, stored) if widen_heads else (model.config, stored)
    hf.write(out, *wanted, tokenizer, {"tokenizer_digest": tokenizer.digest})
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

"""`jorch export`: the newest checkpoint of a run as a folder of Hugging Face safetensors."""

from pathlib import Path
from typing import Any

import yaml

from jorch.checkpoint import Checkpoints
from jorch.config import RlConfig, SftConfig
from jorch.export import hf, pretrained
from jorch.sharding import make_mesh
from jorch.train.optimizer import make_optimizer
from jorch.train.state import abstract_state


def run(source: Path, out: Path) -> None:
    """Export run folder `source` to `out`, with its tokenizer.

    Raises ValueError where `source` is no RL or SFT run, has no checkpoint, or `out` is not empty.
    """
    config_path = source / "config.yaml"
    if not config_path.is_file():
        raise ValueError(f"{source} is no run folder: it has no config.yaml")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    raw: dict[str, Any] = yaml.safe_load(config_path.read_text())
    config = (RlConfig if "tasks_per_step" in raw else SftConfig).model_validate(raw)
    mesh = make_mesh(config.mesh)
    start = pretrained.load(config.init_from or str(source / "model"), mesh)
    updates = config.steps * (config.num_minibatches if isinstance(config, RlConfig) else 1)
    optimizer = make_optimizer(config.optimizer, updates)
    with Checkpoints(source / "checkpoints", config.checkpoint) as checkpoints:
        if checkpoints.latest_step() is None:
            raise ValueError(f"{source} has no checkpoint yet")
        state, _, step = checkpoints.restore(abstract_state(start.model, optimizer, mesh))
    hf.save(out, start.model.config, state.params, start.tokenizer)
    print(f"exported step {step} of {source} to {out}")

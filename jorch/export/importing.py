"""`jorch import`: a folder of Hugging Face safetensors as a checkpoint, tensor by tensor."""

from pathlib import Path

from jorch.export import pretrained, tensors, weights
from jorch.memory import give_back_freed_blocks
from jorch.sections import MeshConfig
from jorch.sharding import make_mesh


def run(source: Path, out: Path, dtype: str | None) -> None:
    """Write checkpoint `out` from `source`, in `dtype` or in the folder's own type.

    Raises ValueError where `source` is no Qwen3 or damaged, or `out` is not empty; then nothing is written.
    """
    refuse_occupied(out)
    give_back_freed_blocks()
    start = pretrained.load(
        str(pretrained.folder_of(str(source), "--from")),
        make_mesh(MeshConfig()),
        param_dtype=dtype or tensors.stored_dtype(source),
    )
    weights.save(out, start.model.config, start.params, start.tokenizer)
    num_params = start.model.num_params()
    print(f"imported {source} to {out}: {num_params:,} parameters in {start.model.config.param_dtype}")


def refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; choose another --out")

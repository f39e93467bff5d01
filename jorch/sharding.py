"""Which mesh axis each logical axis lies on: one table, for parameters and batches alike.

Mesh axes: data (replicas), fsdp (shards of parameters), context (shards of the sequence), tensor (shards of heads,
MLP and vocabulary). Every stage builds its mesh here; one device is simply a mesh of ones.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jorch.sections import MeshConfig

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    "micro": None,
    "rows": ("data", "fsdp"),
    "length": "context",
}


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """(data, fsdp, context, tensor). Raises ValueError where their product is not the number of devices."""
    fixed = config.fsdp * config.context * config.tensor
    data = config.data if config.data != -1 else num_devices // fixed
    if data < 1 or data * fixed != num_devices:
        raise ValueError(
            f"mesh data={config.data} fsdp={config.fsdp} context={config.context} tensor={config.tensor} "
            f"does not cover {num_devices} device(s); their product must be {num_devices} (data=-1 fills up)"
        )
    return data, config.fsdp, config.context, config.tensor


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices. Raises ValueError where the axes' product is not their number."""
    shape = mesh_shape(config, jax.device_count())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Raises ValueError where a dimension does not divide by its mesh axes, or two dimensions want the same one.
    """
    spec: list[Any] = []
    taken: dict[str, str | None] = {}
    for size, axis in zip(shape, axes, strict=True):
        rule = RULES[axis] if axis else None
        mesh_axes = (rule,) if isinstance(rule, str) else rule or ()
        num_shards = int(np.prod([mesh.shape[a] for a in mesh_axes]))
        if size % num_shards:
            allowed = [str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0]
            raise ValueError(
                f"axis {axis!r} of size {size} does not divide over mesh axes {mesh_axes} of size {num_shards}; "
                f"allowed: {', '.join(allowed)}"
            )
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise ValueError(
                    f"axes {taken[mesh_axis]!r} and {axis!r} (of size {size}) both lie on mesh axis {mesh_axis!r}; "
                    "allowed: one of them, the other with an axis of its own or unsharded (None)"
                )
            taken[mesh_axis] = axis
        spec.append(mesh_axes if mesh_axes else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and of everything that every device needs whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Put a host batch of [M, B, T] arrays onto the mesh: rows over data and fsdp, length over context."""

    def place(x: np.ndarray) -> jax.Array:
        # Every process has packed the same batch and puts only its own devices' part of it there.
        return jax.make_array_from_callback(
            x.shape, sharding(mesh, x.shape, ("micro", "rows", "length")), lambda index: x[index]
        )

    return jax.tree.map(place, batch)

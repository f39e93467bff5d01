"""The attention of training rows, by the kernels' one API; where devices share rows, by `kernels.attention.context`."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jorch.model.layers import Attend
from jorch.sections import CONTEXT_TOKENS, ModelConfig
from jorch.sharding import RULES, sharding
from kernels.attention.api import SAVED_NAME as SAVED_NAME
from kernels.attention.api import attention
from kernels.attention.choice import witnessed
from kernels.attention.context import BLOCK, balanced_order, context_attention, reorder
from kernels.attention.tiles import tile


@dataclass(frozen=True)
class PackedRows:
    """How the layers see a batch of packed rows: in which order their tokens lie, and who attends to whom."""

    attend: Attend
    order_BI: jax.Array | None
    """Tiles in the order of the devices that hold them; None = as they come."""
    mesh: Mesh | None

    def spread(self, x_BT: jax.Array) -> jax.Array:
        """Tokens [B, T, ...] in the order in which the layers take them."""
        return x_BT if self.order_BI is None else self._placed(reorder(x_BT, self.order_BI))

    def restore(self, x_BT: jax.Array) -> jax.Array:
        """And back in their own."""
        return x_BT if self.order_BI is None else self._placed(reorder(x_BT, self.order_BI, inverse=True))

    def _placed(self, x_BT: jax.Array) -> jax.Array:
        assert self.mesh is not None
        axes = ("rows", "length", *[None] * (x_BT.ndim - 2))
        return jax.lax.with_sharding_constraint(x_BT, sharding(self.mesh, x_BT.shape, axes))


def packed_rows(mask_BT: jax.Array, head_dim: int, mesh: Mesh | None) -> PackedRows:
    """Attention within packed rows and rollout trees; `mask` as in `kernels.attention.mask`.

    Tiles are listed and dealt out here, once for all layers and both passes. On a mesh every device attends for its own
    rows and heads: XLA could not split a Pallas kernel by itself.
    """
    scale, num_shards = head_dim**-0.5, mesh.shape["context"] if mesh else 1
    attend_whole = partial(attention, scale=scale)
    if mesh is None:
        mask = tile(mask_BT)
        return PackedRows(lambda q, k, v: attend_whole(q, k, v, mask=mask), None, mesh)
    if num_shards == 1:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # block sizes depend on its devices
            mask = tile(mask_BT)
        rows, heads = PartitionSpec(RULES["rows"]), PartitionSpec(RULES["rows"], None, RULES["heads"])
        on_devices = jax.shard_map(
            lambda q, k, v, mask: attend_whole(q, k, v, mask=mask),
            mesh=mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )
        return PackedRows(lambda q, k, v: on_devices(q, k, v, mask), None, mesh)
    order_BI = balanced_order(mask_BT, num_shards, block=_block(mask_BT.shape[1], num_shards))

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        lies = {"mesh": mesh, "rows": RULES["rows"], "heads": RULES["heads"]}
        return context_attention(q_BTNH, k_BTKH, v_BTKH, end_BS=mask_BT, order_BI=order_BI, scale=scale, **lies)

    return PackedRows(attend, order_BI, mesh)


def chosen_paths(config: ModelConfig, num_tokens: int, mesh: Mesh) -> list[str]:
    """Which path of attention rows of this length take on this process's devices, and why; nothing is computed.

    Where a kernel is to be taken it is tried here, which may take seconds (`kernels.attention.trial`).
    """
    rows, dtype = mesh.shape["data"] * mesh.shape["fsdp"], jnp.dtype(config.compute_dtype)
    q, k = (
        jax.ShapeDtypeStruct((rows, num_tokens, heads, config.head_dim), dtype)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    with witnessed() as lines:
        jax.eval_shape(
            lambda q, k, v, mask: packed_rows(mask, config.head_dim, mesh).attend(q, k, v),
            *(q, k, k, jax.ShapeDtypeStruct((rows, num_tokens), jnp.int32)),
        )
    return lines


def _block(num_tokens: int, num_shards: int) -> int:
    """Tokens of a tile: as many as the kernels like, or what divides the devices' parts."""
    assert num_tokens % (num_shards * CONTEXT_TOKENS) == 0, "the config has checked this"
    return math.gcd(num_tokens // num_shards, BLOCK)

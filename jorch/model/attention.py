"""The attention of training rows, by the kernels' one API; where devices share rows, by `kernels.attention.context`."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jorch.config import CONTEXT_TOKENS
from jorch.model.layers import Attend
from jorch.sharding import sharding
from kernels.attention.api import SAVED_NAME as SAVED_NAME
from kernels.attention.api import attention
from kernels.attention.context import balanced_order, context_attention, reorder
from kernels.attention.tiles import BLOCK_Q, tile


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

    Tiles are listed and dealt out here, once for all layers and both passes.
    """
    scale, num_shards = head_dim**-0.5, mesh.shape["context"] if mesh else 1
    if mesh is None or num_shards == 1:
        mask = tile(mask_BT)
        return PackedRows(lambda q, k, v: attention(q, k, v, mask=mask, scale=scale), None, mesh)
    order_BI = balanced_order(mask_BT, num_shards, block=_block(mask_BT.shape[1], num_shards))

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return context_attention(q_BTNH, k_BTKH, v_BTKH, end_BS=mask_BT, order_BI=order_BI, scale=scale, mesh=mesh)

    return PackedRows(attend, order_BI, mesh)


def _block(num_tokens: int, num_shards: int) -> int:
    """Tokens of a tile: as many as the kernels like, or what divides the devices' parts."""
    assert num_tokens % (num_shards * CONTEXT_TOKENS) == 0, "the config has checked this"
    return math.gcd(num_tokens // num_shards, BLOCK_Q)

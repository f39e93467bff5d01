"""The attention of a training row, by the kernels' one API."""

import jax

from jorch.model.layers import Attend
from kernels.attention.api import attention
from kernels.attention.tiles import tile


def packed_attend(mask_BT: jax.Array, head_dim: int) -> Attend:
    """Attention within packed rows and rollout trees; `mask` as in `kernels.attention.mask`.

    Its tiles are listed here, once for all layers and both passes.
    """
    scale, mask = head_dim**-0.5, tile(mask_BT)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, scale=scale)

    return attend

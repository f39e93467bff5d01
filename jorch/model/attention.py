"""The attention of a training row, by the kernels' one API."""

import jax

from jorch.model.layers import Attend
from kernels.attention.api import attention


def packed_attend(mask_BT: jax.Array, head_dim: int) -> Attend:
    """Attention within packed rows and rollout trees; `mask` as in `kernels.attention.api`."""
    scale = head_dim**-0.5

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_BT, scale=scale)

    return attend

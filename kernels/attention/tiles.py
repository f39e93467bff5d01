"""Which tiles of the score matrix hold a visible pair: computed on device once a batch, for all layers and both passes.

Letters: B rows, T = S positions, I query tiles, J key tiles.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels.attention.reference import depths
from kernels.compat import target
from kernels.tuning import blocks


@dataclass(frozen=True)
class TiledMask:
    """A mask with its tile lists (a pytree; `window` and the block sizes are static).

    Only the first `num_..` entries of a list are visible tiles, in ascending order.
    """

    end_BS: jax.Array  # i32, as in kernels.attention.mask, at most T; padded with 0 to whole blocks
    depth_BS: jax.Array  # i32, how many tokens of its own path precede a token; padded likewise
    k_tiles_BIJ: jax.Array  # i32, the key tiles that each query tile sees
    num_k_BI: jax.Array  # i32
    q_tiles_BJI: jax.Array  # i32, the query tiles that see each key tile
    num_q_BJ: jax.Array  # i32
    full_BIJ: jax.Array  # bool, whether every query of a tile sees every key of it
    place_BI: jax.Array  # i32, where in its row each query tile lies: its own index, unless devices share rows
    num_tokens: int  # T, before padding
    window: int | None
    block_q: int
    block_k: int
    stages: int  # halves of tiles that the Hopper gradients keep under way


jax.tree_util.register_dataclass(
    TiledMask,
    data_fields=["end_BS", "depth_BS", "k_tiles_BIJ", "num_k_BI", "q_tiles_BJI", "num_q_BJ", "full_BIJ", "place_BI"],
    meta_fields=["num_tokens", "window", "block_q", "block_k", "stages"],
)


def tile(
    end_BS: jax.Array,
    *,
    window: int | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    stages: int | None = None,
    place_BI: jax.Array | None = None,
) -> TiledMask:
    """The tile lists of a mask i32[B, S].

    Args:
        window: a token sees at most this many tokens of its own path, itself included; None = all.
        block_q: queries of a tile; None = what suits the device (`kernels.tuning`).
        block_k: keys of a tile, likewise; one block size must be a multiple of the other.
        stages: halves of tiles that the Hopper gradients keep under way; None likewise.
        place_BI: the query tiles at hand, by their place in the row; None = all of them in order.

    Raises:
        ValueError: block sizes that do not nest.
    """
    B, num_tokens = end_BS.shape
    default = blocks(target(), num_tokens)
    block_q, block_k, stages = block_q or default.q, block_k or default.k, stages or default.stages
    if max(block_q, block_k) % min(block_q, block_k):
        raise ValueError(f"block_q={block_q} and block_k={block_k}: one must be a multiple of the other")
    # Queries that only fill up a tile see nothing, whatever `end` says.
    end_BS = jnp.minimum(end_BS, num_tokens)
    end_BS = jnp.pad(end_BS, ((0, 0), (0, -num_tokens % max(block_q, block_k))))
    if place_BI is None:
        place_BI = jnp.broadcast_to(
            jnp.arange(end_BS.shape[1] // block_q, dtype=jnp.int32), (B, end_BS.shape[1] // block_q)
        )
    depth_BS = depths(end_BS)
    active_BIJ, full_BIJ = (
        jnp.take_along_axis(of(end_BS, depth_BS, window, block_q, block_k), place_BI[..., None], axis=1)
        for of in (active_tiles, full_tiles)
    )
    lists = (*_lists(active_BIJ), *_lists(active_BIJ.swapaxes(1, 2)))
    return TiledMask(end_BS, depth_BS, *lists, full_BIJ, place_BI, num_tokens, window, block_q, block_k, stages)


def active_tiles(end_BS: jax.Array, depth_BS: jax.Array, window: int | None, block_q: int, block_k: int) -> jax.Array:
    """bool[B, I, J]: False only where no query of tile I sees a key of tile J."""
    B, S = end_BS.shape
    last_end_BJ = end_BS.reshape(B, -1, block_k).max(-1)
    first_q_I = jnp.arange(0, S, block_q)
    first_k_J = jnp.arange(0, S, block_k)
    causal_IJ = first_k_J <= first_q_I[:, None] + block_q - 1
    active_BIJ = causal_IJ & (last_end_BJ[:, None, :] > first_q_I[:, None])
    if window is not None:
        nearest_BI = depth_BS.reshape(B, -1, block_q).min(-1)
        deepest_BJ = depth_BS.reshape(B, -1, block_k).max(-1)
        active_BIJ &= nearest_BI[:, :, None] - deepest_BJ[:, None, :] < window
    return active_BIJ


def full_tiles(end_BS: jax.Array, depth_BS: jax.Array, window: int | None, block_q: int, block_k: int) -> jax.Array:
    """bool[B, I, J]: True only where every query of tile I sees every key of tile J."""
    B, S = end_BS.shape
    first_end_BJ = end_BS.reshape(B, -1, block_k).min(-1)
    first_q_I = jnp.arange(0, S, block_q)
    first_k_J = jnp.arange(0, S, block_k)
    causal_IJ = first_k_J + block_k - 1 <= first_q_I[:, None]
    full_BIJ = causal_IJ & (first_end_BJ[:, None, :] >= first_q_I[:, None] + block_q)
    if window is not None:
        deepest_BI = depth_BS.reshape(B, -1, block_q).max(-1)
        nearest_BJ = depth_BS.reshape(B, -1, block_k).min(-1)
        full_BIJ &= deepest_BI[:, :, None] - nearest_BJ[:, None, :] < window
    return full_BIJ


def _lists(active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(indices of the active tiles of the last axis, first; how many they are)"""
    order = jnp.argsort(~active, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(active, axis=-1, dtype=jnp.int32)

"""Attention tile by tile in plain XLA: memory linear in length, invisible tiles never touched, on any device.

The forward pass is the online softmax; the backward pass recomputes each tile's weights from the saved
log-sum-exp, once for all three gradients. Both follow FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2).

Letters: B rows, T positions, N query heads, K key-value heads, H head dim, I query tiles, J key tiles, C keys of a
tile; Q stands for the N / K query heads of a key-value head times the queries of a tile, stacked.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.tiles import TiledMask


class _Row(NamedTuple):
    """The mask of one row, cut into tiles; with B in front, of all rows."""

    end_JC: jax.Array
    depth_JC: jax.Array
    depth_IX: jax.Array  # by the tiles' places; X queries of a tile
    k_tiles_IJ: jax.Array
    num_k_I: jax.Array
    q_tiles_JI: jax.Array
    num_q_J: jax.Array
    place_I: jax.Array


@dataclass(frozen=True)
class _Rule:
    """How scores are made and which are visible; everything static."""

    block_q: int
    block_k: int
    window: int | None
    scale: float
    softcap: float | None
    num_groups: int

    def scores(self, q_KQH: jax.Array, k_KCH: jax.Array) -> jax.Array:
        """f32[K, Q, C], before masking."""
        s_KQC = jnp.einsum("kqh,kch->kqc", q_KQH, k_KCH, preferred_element_type=jnp.float32) * self.scale
        return s_KQC if self.softcap is None else self.softcap * jnp.tanh(s_KQC / self.softcap)

    def visible(self, row: _Row, i: jax.Array, j: jax.Array) -> jax.Array:
        """bool[Q, C]: what the queries of tile `i` see of the keys of tile `j`."""
        q_X1 = (row.place_I[i] * self.block_q + jnp.arange(self.block_q))[:, None]
        k_1C = (j * self.block_k + jnp.arange(self.block_k))[None, :]
        seen_XC = (k_1C <= q_X1) & (q_X1 < row.end_JC[j])
        if self.window is not None:
            seen_XC &= row.depth_IX[row.place_I[i]][:, None] - row.depth_JC[j] < self.window
        return jnp.tile(seen_XC, (self.num_groups, 1))


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: TiledMask, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] and log-sum-exp f32[B, T, N], as `reference.attention_with_lse`."""
    T, N, K = *q_BTNH.shape[1:3], k_BSKH.shape[2]
    rule, rows = _rule(mask, scale, softcap, N // K), _rows(mask)
    # The same for all rows, so that a loop ends for all of them at once: a mapped loop of its own length for each row
    # would select between whole carries at every step.
    num_steps_I = mask.num_k_BI.max(0)

    def of_row(row: _Row, q_IKQH: jax.Array, k_JKCH: jax.Array, v_JKCH: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_q_tile(args: tuple) -> tuple[jax.Array, jax.Array]:
            i, q_KQH, tiles_J, num, num_steps = args

            def step(n: jax.Array, carry: tuple) -> tuple:
                acc, top, total = carry
                j = tiles_J[n]
                seen_QC = rule.visible(row, i, j) & (n < num)
                s_KQC = jnp.where(seen_QC, rule.scores(q_KQH, k_JKCH[j]), -jnp.inf)
                new_top = jnp.maximum(top, s_KQC.max(-1))
                p_KQC, shrink = jnp.exp(s_KQC - new_top[..., None]), jnp.exp(top - new_top)
                acc = acc * shrink[..., None] + _dot("kqc,kch->kqh", p_KQC, v_JKCH[j])
                return acc, new_top, total * shrink + p_KQC.sum(-1)

            zeros_KQ = jnp.zeros(q_KQH.shape[:2], jnp.float32)
            # A finite maximum keeps exp(-inf - max) at 0 instead of NaN where a query sees nothing.
            start = (jnp.zeros(q_KQH.shape, jnp.float32), zeros_KQ + jnp.finfo(jnp.float32).min, zeros_KQ)
            acc, top, total = jax.lax.fori_loop(0, num_steps, step, start)
            blind = total == 0
            total = jnp.where(blind, 1.0, total)
            return (acc / total[..., None]).astype(v_JKCH.dtype), jnp.where(blind, -jnp.inf, top + jnp.log(total))

        return jax.lax.map(of_q_tile, (jnp.arange(len(q_IKQH)), q_IKQH, row.k_tiles_IJ, row.num_k_I, num_steps_I))

    q = _cut(q_BTNH, K, mask.block_q, mask.num_k_BI.shape[1])
    k, v = (_cut(x, K, mask.block_k, mask.num_q_BJ.shape[1]) for x in (k_BSKH, v_BSKH))
    o_BIKQH, lse_BIKQ = jax.vmap(of_row)(rows, q, k, v)
    return _join(o_BIKQH, N, T), _join(lse_BIKQ[..., None], N, T)[..., 0]


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: TiledMask,
    scale: float,
    softcap: float | None,
    lse_BTN: jax.Array,
    do_BTNH: jax.Array,
    delta_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v in float32, given that of the outputs; `delta` as in `gradient.py`."""
    (T, N), (S, K) = q_BTNH.shape[1:3], k_BSKH.shape[1:3]
    rule, rows = _rule(mask, scale, softcap, N // K), _rows(mask)
    num_steps_J = mask.num_q_BJ.max(0)

    def of_row(row: _Row, *tiles: jax.Array) -> tuple[jax.Array, ...]:
        q_IKQH, k_JKCH, v_JKCH, do_IKQH, lse_IKQ1, delta_IKQ1 = tiles

        def of_k_tile(dq_IKQH: jax.Array, args: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            j, k_KCH, v_KCH, tiles_I, num, num_steps = args

            def step(n: jax.Array, carry: tuple) -> tuple:
                dq_IKQH, dk_KCH, dv_KCH = carry
                i = tiles_I[n]
                seen_QC = rule.visible(row, i, j) & (n < num)
                s_KQC = rule.scores(q_IKQH[i], k_KCH)
                p_KQC = jnp.where(seen_QC, jnp.exp(s_KQC - lse_IKQ1[i]), 0.0)
                dp_KQC = _dot("kqh,kch->kqc", do_IKQH[i], v_KCH)
                ds_KQC = scale * p_KQC * (dp_KQC - delta_IKQ1[i])
                if softcap is not None:
                    ds_KQC *= 1 - jnp.square(s_KQC / softcap)
                dq_IKQH = dq_IKQH.at[i].add(_dot("kqc,kch->kqh", ds_KQC, k_KCH))
                dk_KCH += _dot("kqc,kqh->kch", ds_KQC, q_IKQH[i])
                dv_KCH += _dot("kqc,kqh->kch", p_KQC, do_IKQH[i])
                return dq_IKQH, dk_KCH, dv_KCH

            zeros_KCH = jnp.zeros(k_KCH.shape, jnp.float32)
            dq_IKQH, dk_KCH, dv_KCH = jax.lax.fori_loop(0, num_steps, step, (dq_IKQH, zeros_KCH, zeros_KCH))
            return dq_IKQH, (dk_KCH, dv_KCH)

        xs = (jnp.arange(len(k_JKCH)), k_JKCH, v_JKCH, row.q_tiles_JI, row.num_q_J, num_steps_J)
        dq_IKQH, (dk_JKCH, dv_JKCH) = jax.lax.scan(of_k_tile, jnp.zeros(q_IKQH.shape, jnp.float32), xs)
        return dq_IKQH, dk_JKCH, dv_JKCH

    by_query = (q_BTNH, do_BTNH, lse_BTN[..., None], delta_BTN[..., None])
    q, do, lse, delta = (_cut(x, K, mask.block_q, mask.num_k_BI.shape[1]) for x in by_query)
    k, v = (_cut(x, K, mask.block_k, mask.num_q_BJ.shape[1]) for x in (k_BSKH, v_BSKH))
    dq, dk, dv = jax.vmap(of_row)(rows, q, k, v, do, lse, delta)
    return _join(dq, N, T), _join(dk, K, S), _join(dv, K, S)


def _dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in the dtype of the inputs, `right`'s, summed in float32."""
    return jnp.einsum(spec, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _rule(mask: TiledMask, scale: float, softcap: float | None, num_groups: int) -> _Rule:
    return _Rule(mask.block_q, mask.block_k, mask.window, scale, softcap, num_groups)


def _rows(mask: TiledMask) -> _Row:
    B = len(mask.end_BS)
    return _Row(
        mask.end_BS.reshape(B, -1, mask.block_k),
        mask.depth_BS.reshape(B, -1, mask.block_k),
        mask.depth_BS.reshape(B, -1, mask.block_q),
        mask.k_tiles_BIJ,
        mask.num_k_BI,
        mask.q_tiles_BJI,
        mask.num_q_BJ,
        mask.place_BI,
    )


def _cut(x_BTNH: jax.Array, num_kv_heads: int, block: int, num_tiles: int) -> jax.Array:
    """Tiles [B, I, K, Q, H], zeros at the end."""
    B, T, N, H = x_BTNH.shape
    x = jnp.pad(x_BTNH, ((0, 0), (0, num_tiles * block - T), (0, 0), (0, 0)))
    x = x.reshape(B, -1, block, num_kv_heads, N // num_kv_heads, H).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(B, -1, num_kv_heads, N // num_kv_heads * block, H)


def _join(x_BIKQH: jax.Array, num_heads: int, num_tokens: int) -> jax.Array:
    """[B, T, N, H] from tiles, without what was padded."""
    B, num_tiles, K, Q, H = x_BIKQH.shape
    G = num_heads // K
    x = x_BIKQH.reshape(B, num_tiles, K, G, Q // G, H).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, -1, num_heads, H)[:, :num_tokens]

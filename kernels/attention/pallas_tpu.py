"""Attention for TPUs in Pallas: visits active tiles only, and masks only those that are not wholly visible.

The tile lists of a row become one list of visits, each a (query tile, key tile) with marks, which the cores read from
scalar memory; the grid is as long as the list, known only on device. So nothing is spent on tiles that nobody sees, not
even an empty step. Rows go one after another: scalar memory holds one row's list at a time.

The forward pass and the gradient of q visit by query tiles and keep the query tile; the gradients of k and v visit by
key tiles and work on transposed scores, so that log-sum-exp and delta are rows there. Both recompute the weights from
the saved log-sum-exp, as FlashAttention-2 does (arXiv 2307.08691).

Where devices share rows, the query tiles at hand are some of a row's; their places come through scalar memory too.

Letters: T queries at hand, S positions of a row, N query heads, K key-value heads, G = N / K, H head dim, I query
tiles, J key tiles, X queries of a tile, C keys of a tile, E visits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.tiles import TiledMask
from kernels.compat import VMEM, PrefetchGrid, TpuParams, pl

LANES = 128
"""Columns of a register; numbers that belong to a query lie in scratch repeated over all of them."""

MOST_VISITS = 2**17
"""Visits that fit half of the smallest scalar memory, 1 MiB."""

_ACTIVE, _FULL, _FIRST, _LAST = 1, 2, 4, 8
_INNER_BITS = 12
FLOAT_MIN = float(jnp.finfo(jnp.float32).min)


class _Visit(NamedTuple):
    """One step of the grid: `inner` tile seen by `outer` tile, and the marks."""

    outer: jax.Array
    inner: jax.Array
    active: jax.Array  # false for the one visit of an outer tile that sees nothing
    full: jax.Array
    first: jax.Array  # of its outer tile
    last: jax.Array

    @classmethod
    def of(cls, code: jax.Array) -> "_Visit":
        marks = [(code & mark) != 0 for mark in (_ACTIVE, _FULL, _FIRST, _LAST)]
        return cls(code >> (_INNER_BITS + 4), (code >> 4) & (2**_INNER_BITS - 1), *marks)


def num_visits(num_tokens: int, block_q: int, block_k: int, num_queries: int | None = None) -> int:
    """The most visits that a row of `num_tokens` can need, what the list has room for.

    They are those of a causal row, or of its last `num_queries`, wherever the queries at hand lie.
    """
    S = num_tokens + -num_tokens % max(block_q, block_k)
    I, J = S // block_q, S // block_k  # noqa: E741
    num_tiles = I if num_queries is None else num_queries // block_q
    seen = sum(-(-(i + 1) * block_q // block_k) for i in range(I - num_tiles, I))
    # A tile that sees nothing, or that nobody sees, is visited once; in a whole row every key tile has its own queries.
    return max(seen, J) if num_tiles == I else seen + J


def _visits(lists: tuple[jax.Array, jax.Array], full_OI: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """(i32[E] codes of the visits, outer tile by outer tile; how many they are, at least one an outer tile)"""
    inner_OI, num_O = lists
    length_O = jnp.maximum(num_O, 1)
    stop_O = jnp.cumsum(length_O)
    visit_E = jnp.arange(room, dtype=jnp.int32)
    outer_E = jnp.minimum(jnp.searchsorted(stop_O, visit_E, side="right"), len(num_O) - 1).astype(jnp.int32)
    place_E = visit_E - (stop_O - length_O)[outer_E]
    inner_E = inner_OI[outer_E, jnp.minimum(place_E, inner_OI.shape[1] - 1)]
    marks_E = (
        jnp.where(num_O[outer_E] > 0, _ACTIVE, 0)
        | jnp.where(full_OI[outer_E, inner_E], _FULL, 0)
        | jnp.where(place_E == 0, _FIRST, 0)
        | jnp.where(place_E == length_O[outer_E] - 1, _LAST, 0)
    )
    return outer_E << (_INNER_BITS + 4) | inner_E << 4 | marks_E, stop_O[-1]


@dataclass(frozen=True)
class _Rule:
    """What is known when a function is traced."""

    block_q: int
    block_k: int
    scale: float
    softcap: float | None
    num_groups: int
    window: int | None

    @property
    def num_sight(self) -> int:
        """How many of a kernel's arrays tell who sees whom: ends, and under a window depths of keys and of queries."""
        return 1 if self.window is None else 3

    def dot(self, left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
        """A product over one axis of each, in `right`'s dtype, summed in float32."""
        precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else None
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        left = left.astype(right.dtype)
        return jax.lax.dot_general(left, right, dimensions, precision, preferred_element_type=jnp.float32)

    def capped(self, s: jax.Array) -> jax.Array:
        s = s * self.scale
        return s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)

    def slope(self, s: jax.Array) -> jax.Array | float:
        """d score / d product."""
        return self.scale if self.softcap is None else self.scale * (1 - jnp.square(s / self.softcap))

    def visible(self, first_q: jax.Array, first_k: jax.Array, sight: Any, query_axis: int) -> jax.Array:
        """bool, queries along `query_axis` and keys along the other.

        Args:
            first_q: the place of the tile's first query in its row.
            sight: rows of the keys' ends, and under a window of the keys' and the queries' depths.
        """
        shape = (self.block_q, self.block_k) if query_axis == 0 else (self.block_k, self.block_q)
        q = first_q + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
        k = first_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)

        def along(row: Any, axis: int) -> jax.Array:
            return row[...] if axis == 1 else _column(row[...])[:, :1]

        end, *depths = sight
        seen = (k <= q) & (q < along(end, 1 - query_axis))
        if self.window is not None:
            of_keys, of_queries = depths
            seen &= along(of_queries, query_axis) - along(of_keys, 1 - query_axis) < self.window
        return seen


def _column(row_1X: jax.Array) -> jax.Array:
    """[X, LANES] of a row: its numbers down the rows of a register, repeated over the columns."""
    return jnp.broadcast_to(row_1X, (LANES, row_1X.shape[1])).T


def _masked_or_not(visit: _Visit, compute: Callable[[bool], None]) -> None:
    """`compute` without a mask where the whole tile is visible, with it where part of the tile is."""
    pl.when(visit.active & visit.full)(lambda: compute(False))
    pl.when(visit.active & ~visit.full)(lambda: compute(True))


def _forward_kernel(rule: _Rule, code_E: Any, place_I: Any, *refs: Any):
    sight, (q, k, v, o, lse, acc_XH, top_XL, total_XL) = refs[: rule.num_sight], refs[rule.num_sight :]
    visit = _Visit.of(code_E[pl.program_id(1)])
    first_q, first_k = place_I[visit.outer] * rule.block_q, visit.inner * rule.block_k

    @pl.when(visit.first)
    def _():
        acc_XH[...] = jnp.zeros_like(acc_XH)
        # A finite maximum keeps exp(-inf - max) at 0 instead of NaN where a query sees nothing.
        top_XL[...] = jnp.full_like(top_XL, FLOAT_MIN)
        total_XL[...] = jnp.zeros_like(total_XL)

    def compute(masked: bool) -> None:
        s_XC = rule.capped(rule.dot(q[...], k[...], (1, 1)))
        if masked:
            s_XC = jnp.where(rule.visible(first_q, first_k, sight, 0), s_XC, -jnp.inf)
        top_X1 = top_XL[:, :1]
        new_top_X1 = jnp.maximum(top_X1, s_XC.max(1, keepdims=True))
        p_XC, shrink_X1 = jnp.exp(s_XC - new_top_X1), jnp.exp(top_X1 - new_top_X1)
        acc_XH[...] = acc_XH[...] * shrink_X1 + rule.dot(p_XC, v[...], (1, 0))
        total_X1 = total_XL[:, :1] * shrink_X1 + p_XC.sum(1, keepdims=True)
        top_XL[...] = jnp.broadcast_to(new_top_X1, top_XL.shape)
        total_XL[...] = jnp.broadcast_to(total_X1, total_XL.shape)

    _masked_or_not(visit, compute)

    @pl.when(visit.last)
    def _():
        blind_XL = total_XL[...] == 0
        total = jnp.where(blind_XL, 1.0, total_XL[...])
        o[...] = (acc_XH[...] / total[:, :1]).astype(o.dtype)
        lse[...] = jnp.where(blind_XL, -jnp.inf, top_XL[...] + jnp.log(total)).T[:1]


def _dq_kernel(rule: _Rule, code_E: Any, place_I: Any, *refs: Any):
    sight, (q, k, v, do, lse, delta, dq, acc_XH, lse_XL, delta_XL) = refs[: rule.num_sight], refs[rule.num_sight :]
    visit = _Visit.of(code_E[pl.program_id(1)])
    first_q, first_k = place_I[visit.outer] * rule.block_q, visit.inner * rule.block_k

    @pl.when(visit.first)
    def _():
        acc_XH[...] = jnp.zeros_like(acc_XH)
        lse_XL[...], delta_XL[...] = _column(lse[...]), _column(delta[...])

    def compute(masked: bool) -> None:
        s_XC = rule.capped(rule.dot(q[...], k[...], (1, 1)))
        p_XC = jnp.exp(s_XC - lse_XL[:, :1])
        if masked:
            p_XC = jnp.where(rule.visible(first_q, first_k, sight, 0), p_XC, 0.0)
        dp_XC = rule.dot(do[...], v[...], (1, 1))
        ds_XC = p_XC * (dp_XC - delta_XL[:, :1]) * rule.slope(s_XC)
        acc_XH[...] += rule.dot(ds_XC, k[...], (1, 0))

    _masked_or_not(visit, compute)

    @pl.when(visit.last)
    def _():
        dq[...] = acc_XH[...].astype(dq.dtype)


def _dkv_kernel(rule: _Rule, code_E: Any, place_I: Any, *refs: Any):
    sight, (q, k, v, do, lse, delta, dk, dv, dk_CH, dv_CH) = refs[: rule.num_sight], refs[rule.num_sight :]
    visit, group = _Visit.of(code_E[pl.program_id(1)]), pl.program_id(2)
    first_q, first_k = place_I[visit.inner] * rule.block_q, visit.outer * rule.block_k

    @pl.when(visit.first & (group == 0))
    def _():
        dk_CH[...] = jnp.zeros_like(dk_CH)
        dv_CH[...] = jnp.zeros_like(dv_CH)

    def compute(masked: bool) -> None:
        s_CX = rule.capped(rule.dot(k[...], q[...], (1, 1)))
        p_CX = jnp.exp(s_CX - lse[...])
        if masked:
            p_CX = jnp.where(rule.visible(first_q, first_k, sight, 1), p_CX, 0.0)
        dp_CX = rule.dot(v[...], do[...], (1, 1))
        ds_CX = p_CX * (dp_CX - delta[...]) * rule.slope(s_CX)
        dv_CH[...] += rule.dot(p_CX, do[...], (1, 0))
        dk_CH[...] += rule.dot(ds_CX, q[...], (1, 0))

    _masked_or_not(visit, compute)

    @pl.when(visit.last & (group == rule.num_groups - 1))
    def _():
        dk[...], dv[...] = dk_CH[...].astype(dk.dtype), dv_CH[...].astype(dv.dtype)


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: TiledMask, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] and log-sum-exp f32[B, T, N], as `reference.attention_with_lse`."""
    T, rule = q_BTNH.shape[1], _rule(mask, q_BTNH, k_BSKH, scale, softcap)
    q, k, v = _heads_first(_queries(mask), q_BTNH), *(_heads_first(mask.end_BS.shape[1], x) for x in (k_BSKH, v_BSKH))
    o_BNTH, lse_BNT = jax.lax.map(lambda row: _forward_row(rule, *row), (_rows(mask), q, k, v))
    return o_BNTH.swapaxes(1, 2)[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]


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
    """The gradients of q, k and v in their dtypes, given that of the outputs; `delta` as in `gradient.py`."""
    T, S, rule = q_BTNH.shape[1], k_BSKH.shape[1], _rule(mask, q_BTNH, k_BSKH, scale, softcap)
    q, do = (_heads_first(_queries(mask), x) for x in (q_BTNH, do_BTNH.astype(q_BTNH.dtype)))
    k, v = (_heads_first(mask.end_BS.shape[1], x) for x in (k_BSKH, v_BSKH))
    numbers = (_heads_first(_queries(mask), x[..., None]).swapaxes(2, 3) for x in (lse_BTN, delta_BTN))
    gradients = jax.lax.map(lambda row: _backward_row(rule, *row), (_rows(mask), q, k, v, do, *numbers))
    dq, dk, dv = (x.swapaxes(1, 2) for x in gradients)
    return dq[:, :T], dk[:, :S], dv[:, :S]


class _Row(NamedTuple):
    """The mask of one row; with B in front, of all rows."""

    sight: tuple[jax.Array, ...]  # i32[1, S] the keys' ends; under a window their depths, and i32[1, T] the queries'
    place_I: jax.Array
    full_IJ: jax.Array
    k_lists: tuple[jax.Array, jax.Array]
    q_lists: tuple[jax.Array, jax.Array]


def _rows(mask: TiledMask) -> _Row:
    sight = [mask.end_BS]
    if mask.window is not None:
        depth_BIX = mask.depth_BS.reshape(len(mask.end_BS), -1, mask.block_q)
        depth_BIX = jnp.take_along_axis(depth_BIX, mask.place_BI[..., None], axis=1)
        sight += [mask.depth_BS, depth_BIX.reshape(len(mask.end_BS), -1)]
    return _Row(
        tuple(x[:, None] for x in sight),
        mask.place_BI,
        mask.full_BIJ,
        (mask.k_tiles_BIJ, mask.num_k_BI),
        (mask.q_tiles_BJI, mask.num_q_BJ),
    )


def _rule(mask: TiledMask, q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float, softcap: float | None) -> _Rule:
    num_groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    return _Rule(mask.block_q, mask.block_k, scale, softcap, num_groups, mask.window)


def _queries(mask: TiledMask) -> int:
    """Queries at hand, in whole tiles."""
    return mask.place_BI.shape[1] * mask.block_q


def _heads_first(num_tokens: int, x_BTNH: jax.Array) -> jax.Array:
    """[B, N, num_tokens, H], zeros up to there."""
    return jnp.pad(x_BTNH, ((0, 0), (0, num_tokens - x_BTNH.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


class _Specs:
    """Which block of each array a visit needs; `by_query` says that its outer tile is the query tile.

    The grid is (query heads, visits), or (key-value heads, visits, query heads of each).
    """

    def __init__(self, rule: _Rule, H: int, by_query: bool) -> None:
        def heads(n: Any, groups: tuple) -> tuple[Any, Any]:
            """(query head, key-value head)"""
            return (n * rule.num_groups + groups[0], n) if groups else (n, n // rule.num_groups)

        def tiles(code: jax.Array) -> tuple[jax.Array, jax.Array]:
            """(query tile, key tile)"""
            visit = _Visit.of(code)
            return (visit.outer, visit.inner) if by_query else (visit.inner, visit.outer)

        def of_query(n: Any, e: Any, *rest: Any) -> tuple[Any, Any]:
            *groups, codes, _ = rest
            return heads(n, tuple(groups))[0], tiles(codes[e])[0]

        def of_key(n: Any, e: Any, *rest: Any) -> tuple[Any, Any]:
            *groups, codes, _ = rest
            return heads(n, tuple(groups))[1], tiles(codes[e])[1]

        def of_number(*at: Any) -> tuple[Any, Any, Any]:
            n, i = of_query(*at)
            return n, 0, i

        self.q = pl.BlockSpec((None, rule.block_q, H), lambda *at: (*of_query(*at), 0))
        self.kv = pl.BlockSpec((None, rule.block_k, H), lambda *at: (*of_key(*at), 0))
        self.number = pl.BlockSpec((None, 1, rule.block_q), of_number)
        of_keys = pl.BlockSpec((1, rule.block_k), lambda *at: (0, of_key(*at)[1]))
        of_queries = pl.BlockSpec((1, rule.block_q), lambda *at: (0, of_query(*at)[1]))
        self.sight = [of_keys, of_keys, of_queries][: rule.num_sight]


def _call(
    rule: _Rule, kernel: Any, grid: tuple, visits: tuple, row: _Row, in_specs: list, outputs: list, scratch: list
) -> Any:
    """A kernel over `grid`, whose second axis is the visits; `outputs` are (spec, shape) pairs."""
    code_E, num = visits
    specs, shapes = zip(*outputs, strict=True)
    call = pl.pallas_call(
        partial(kernel, rule),
        grid_spec=PrefetchGrid(
            num_scalar_prefetch=2,
            grid=(grid[0], num, *grid[1:]),
            in_specs=in_specs,
            out_specs=specs,
            scratch_shapes=[VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=TpuParams(dimension_semantics=("parallel", *("arbitrary",) * len(grid))),
        name=kernel.__name__.strip("_"),
    )
    return partial(call, code_E, row.place_I, *row.sight)


def _room(rule: _Rule, row: _Row) -> int:
    S = row.sight[0].shape[1]
    return num_visits(S, rule.block_q, rule.block_k, len(row.place_I) * rule.block_q)


def _forward_row(rule: _Rule, row: _Row, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_NTH = arrays[0]
    (N, T, H), X = q_NTH.shape, rule.block_q
    spec = _Specs(rule, H, by_query=True)
    visits = _visits(row.k_lists, row.full_IJ, _room(rule, row))
    outputs = [
        (spec.q, jax.ShapeDtypeStruct((N, T, H), q_NTH.dtype)),
        (spec.number, jax.ShapeDtypeStruct((N, 1, T), jnp.float32)),
    ]
    in_specs, scratch = [*spec.sight, spec.q, spec.kv, spec.kv], [(X, H), (X, LANES), (X, LANES)]
    o_NTH, lse_N1T = _call(rule, _forward_kernel, (N,), visits, row, in_specs, outputs, scratch)(*arrays)
    return o_NTH, lse_N1T[:, 0]


def _backward_row(rule: _Rule, row: _Row, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_NTH, k_KSH = arrays[:2]
    (N, _, H), K, X, C = q_NTH.shape, len(k_KSH), rule.block_q, rule.block_k
    dq_shape, dk_shape = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_NTH, k_KSH))

    def in_specs(spec: _Specs) -> list:
        return [*spec.sight, spec.q, spec.kv, spec.kv, spec.q, spec.number, spec.number]

    spec = _Specs(rule, H, by_query=True)
    visits, scratch = _visits(row.k_lists, row.full_IJ, _room(rule, row)), [(X, H), (X, LANES), (X, LANES)]
    call = _call(rule, _dq_kernel, (N,), visits, row, in_specs(spec), [(spec.q, dq_shape)], scratch)
    (dq_NTH,) = call(*arrays)

    spec = _Specs(rule, H, by_query=False)
    visits, outputs = _visits(row.q_lists, row.full_IJ.T, _room(rule, row)), [(spec.kv, dk_shape)] * 2
    scratch = [(C, H), (C, H)]
    call = _call(rule, _dkv_kernel, (K, rule.num_groups), visits, row, in_specs(spec), outputs, scratch)
    return dq_NTH, *call(*arrays)

"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: reads active tiles only, masks only what is partly visible.

A block of three warpgroups owns one tile of one head. Two of them compute, each for half of the tile's rows; the third
copies the tiles that the list names through a ring in shared memory. The forward pass and the gradient of q own a
query tile; the gradients of k and v own a key tile and work on transposed scores, through all query heads of the group.
Both backward kernels recompute the weights from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691) and share
nothing, so that the result is the same at every run.

Letters: T queries at hand, S positions of a row, N query heads, K key-value heads, G = N / K, H head dim, I query
tiles, J key tiles, R rows of a warpgroup, C rows of what it streams past them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.tiles import TiledMask
from kernels.compat import FRUGAL, interpreted, load, pl, plgpu

BLOCK = 128
"""Queries of a tile, keys of a tile."""

_R = 64
_C = 64
"""The backward kernels stream a tile in halves: their accumulators leave no registers for whole ones."""

_FORWARD_STAGES = 2
"""Whole tiles under way in the forward pass: with heads of 128 shared memory has no room for a third."""

_LOG2_E = math.log2(math.e)
_INVISIBLE = 1e15
"""Minus this stands for the score of an invisible pair; its square is still a float32."""

_WGMMA = plgpu.Layout.WGMMA
_OF_ROWS, _OF_COLUMNS = _WGMMA.reduce(1), _WGMMA.reduce(0)
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 32
"""Of a thread; twice the one and the other are all that a multiprocessor has for each of 128 threads."""


@dataclass(frozen=True)
class _Rule:
    """What is known when a function is traced, and the products of a warpgroup.

    jax's interpreter has neither products with a left side in registers nor layouts on all versions: where it runs the
    kernel, products are plain ones of the same shared arrays. Copies, barriers and the ring are as on the device.
    """

    scale: float
    softcap: float | None
    num_groups: int
    dtype: Any
    head_dim: int
    stages: int
    """How much of what is streamed is in shared memory or on its way: tiles forward, parts of them backward."""
    interpreted: bool
    window: int | None
    part: int = _C
    """Rows of a tile that the backward kernels stream at once, and columns of what shared memory keeps together."""

    @property
    def parts(self) -> int:
        return BLOCK // self.part

    @property
    def num_sight(self) -> int:
        """How many of a kernel's arrays tell who sees whom: ends, places of query tiles, and under a window depths."""
        return 2 if self.window is None else 3

    def laid_out(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpreted else plgpu.layout_cast(x, layout)

    def zeros(self, *shape: int) -> jax.Array:
        return self.laid_out(jnp.zeros(shape, jnp.float32), _WGMMA if len(shape) == 2 else _OF_ROWS)

    def load(self, ref: Any, layout: Any) -> jax.Array:
        return ref[...] if self.interpreted else load(ref, layout)

    def product(self, left: Any, right: Any, less: jax.Array | None = None) -> jax.Array:
        """f32[R, C] = left[R, H] @ right[C, H].T - less, both in shared memory."""
        if self.interpreted:
            found = jnp.dot(left[...], right[...].T, preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return found if less is None else found - less

        def multiply(accumulator: Any) -> None:
            plgpu.wgmma(accumulator, left, right.transpose((1, 0)))

        if less is not None:
            return pl.run_state(multiply)(plgpu.ACC.init(-less))

        def of_zero(accumulator: Any) -> jax.Array:
            multiply(accumulator)
            return accumulator[...]

        return pl.run_scoped(of_zero, plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32))

    def add_product(self, accumulated: jax.Array, left: jax.Array, right: Any) -> jax.Array:
        """f32[R, H]: accumulated + left[R, C] @ right[C, H]; left in registers, right in shared memory."""
        left = left.astype(self.dtype)
        if self.interpreted:
            found = accumulated + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return found
        return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(accumulated))

    def capped(self, product: jax.Array) -> jax.Array:
        """Scores in units of log 2, so that weights are powers of two."""
        if self.softcap is None:
            return product * (self.scale * _LOG2_E)
        return jnp.tanh(product * (self.scale / self.softcap)) * (self.softcap * _LOG2_E)

    def slope(self, scores: jax.Array) -> jax.Array | float:
        """d score / d product, from `capped` scores."""
        if self.softcap is None:
            return self.scale
        return self.scale - self.scale * jnp.square(scores * (1 / (self.softcap * _LOG2_E)))

    def where_visible(self, full: Any, scores: jax.Array, tests: list[Callable[[], jax.Array]]) -> jax.Array:
        """Scores, those of invisible pairs far below all others; tests run only where the tile is not all visible.

        One after another: together they would need more registers than there are.
        """
        for seen in tests:
            scores = lax.cond(
                full,
                lambda scores=scores: scores,
                lambda scores=scores, seen=seen: jnp.where(seen(), scores, -_INVISIBLE),
            )
        return scores

    def positions(self, first: Any, shape: tuple[int, int], axis: int) -> jax.Array:
        found = lax.broadcasted_iota(jnp.int32, shape, axis)
        return self.laid_out(found, _WGMMA) + first

    def tests(
        self, sight: Any, b: Any, first_q: Callable[[], Any], first_k: Any, shape: tuple[int, int], query_axis: int
    ) -> list[Callable[[], jax.Array]]:
        """What a visible pair passes, each a bool array.

        Queries lie along `query_axis`, from position `first_q` of their row on, which is read only where it is needed.
        """
        end, _, *depths = sight
        layouts, window = (_OF_ROWS, _OF_COLUMNS), self.window

        def along(ref: Any, first: Any, axis: int) -> jax.Array:
            return _across(self.load(ref.at[b, pl.ds(first, shape[axis])], layouts[axis]), shape, axis)

        def seen() -> jax.Array:
            q, k = self.positions(first_q(), shape, query_axis), self.positions(first_k, shape, 1 - query_axis)
            return (k <= q) & (q < along(end, first_k, 1 - query_axis))

        if window is None:
            return [seen]
        (depth,) = depths

        def near() -> jax.Array:
            return along(depth, first_q(), query_axis) - along(depth, first_k, 1 - query_axis) < window

        return [seen, near]

    def shared(self, *shape: int) -> Any:
        """Shared memory that products and copies can both use."""
        transforms = (plgpu.TilingTransform((8, self.part)), plgpu.SwizzleTransform(self.part * self.dtype.itemsize))
        return plgpu.SMEM(shape, self.dtype, transforms=transforms)


def _across(x_R: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector that runs along `axis`, the same along the other."""
    return lax.broadcast_in_dim(x_R, shape, [axis])


def _ring(stages: int, num_steps: Any, free: Any, copy: Callable[[Any, Any], None]) -> None:
    """The copying warpgroup: `copy(step, slot)` for every step, each slot once both others have let go of it."""
    plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

    def wait(step: Any, _: None) -> None:
        plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

    def fill(step: Any, _: None) -> None:
        pl.when(step >= stages)(lambda: wait(step, None))
        copy(step, lax.rem(step, jnp.int32(stages)))

    lax.fori_loop(0, num_steps, fill, None)
    # The last slots too: a block must not end with its barriers under way.
    lax.fori_loop(jnp.maximum(num_steps - stages, 0), num_steps, wait, None)


def _store(smem: Any, x: jax.Array, gmem: Any) -> None:
    smem[...] = x.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
    plgpu.wait_smem_to_gmem(0)


def _forward_kernel(rule: _Rule, *refs: Any) -> None:
    sight, refs = refs[: rule.num_sight], refs[rule.num_sight :]
    q, k, v, tiles, counts, o, lse, q_s, k_s, v_s, lse_s, q_ready, k_ready, v_ready, free = refs
    b, n, i, wg = (lax.axis_index(name) for name in ("row", "head", "tile", "warpgroup"))
    num_steps, shape = counts[b, i], (_R, BLOCK)

    @pl.when(wg < 2)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        first_q = i * BLOCK + wg * _R
        own_q = q_s.at[wg]
        plgpu.copy_gmem_to_smem(q.at[b, pl.ds(first_q, _R), n], own_q, q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])

        def step(at: Any, carry: tuple) -> tuple:
            acc_RH, top_R, total_R = carry
            slot, code = lax.rem(at, jnp.int32(rule.stages)), tiles[b, i, at]
            first_k = lax.shift_right_logical(code, jnp.int32(1)) * BLOCK

            tests = rule.tests(sight, b, lambda: sight[1][b, i] * BLOCK + wg * _R, first_k, shape, 0)

            plgpu.barrier_wait(k_ready.at[slot])
            full = lax.rem(code, jnp.int32(2)) == 1
            s_RC = rule.where_visible(full, rule.capped(rule.product(own_q, k_s.at[slot])), tests)
            # Not below the half of what stands for invisible: a row that sees nothing keeps weights of 0.
            new_top_R = jnp.maximum(top_R, s_RC.max(axis=1))
            p_RC, shrink_R = jnp.exp2(s_RC - _across(new_top_R, shape, 0)), jnp.exp2(top_R - new_top_R)
            total_R = total_R * shrink_R + p_RC.sum(axis=1)
            plgpu.barrier_wait(v_ready.at[slot])
            acc_RH = acc_RH * _across(shrink_R, acc_RH.shape, 0)
            acc_RH = rule.add_product(acc_RH, p_RC, v_s.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return acc_RH, new_top_R, total_R

        start = (rule.zeros(_R, rule.head_dim), rule.zeros(_R) - _INVISIBLE / 2, rule.zeros(_R))
        acc_RH, top_R, total_R = lax.fori_loop(0, num_steps, step, start)
        some_R = jnp.where(total_R > 0, total_R, 1.0)
        own_lse = lse_s.at[wg]
        own_lse[...] = jnp.where(total_R > 0, (top_R + jnp.log2(some_R)) * (1 / _LOG2_E), -jnp.inf)
        own_q[...] = (acc_RH / _across(some_R, acc_RH.shape, 0)).astype(rule.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, o.at[b, pl.ds(first_q, _R), n])
        plgpu.copy_smem_to_gmem(own_lse, lse.at[b, n, pl.ds(first_q, _R)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _() -> None:
        kv_head = lax.div(n, jnp.int32(rule.num_groups))

        def copy(at: Any, slot: Any) -> None:
            first_k = lax.shift_right_logical(tiles[b, i, at], jnp.int32(1)) * BLOCK
            source = (b, pl.ds(first_k, BLOCK), kv_head)
            plgpu.copy_gmem_to_smem(k.at[source], k_s.at[slot], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(v.at[source], v_s.at[slot], v_ready.at[slot])

        _ring(rule.stages, num_steps, free, copy)


def _load_rows(wg: Any, sources: tuple, kept: tuple, ready: Any) -> list[Any]:
    """A warpgroup's own rows of two arrays, in shared memory."""
    own = [smem.at[wg] for smem in kept]
    for source, smem in zip(sources, own, strict=True):
        plgpu.copy_gmem_to_smem(source, smem, ready.at[wg])
    plgpu.barrier_wait(ready.at[wg])
    return own


def _dq_kernel(rule: _Rule, *refs: Any) -> None:
    sight, refs = refs[: rule.num_sight], refs[rule.num_sight :]
    q, k, v, do, lse, delta, tiles, counts, dq, q_s, do_s, k_s, v_s, rows_ready, ready, free = refs
    b, n, i, wg = (lax.axis_index(name) for name in ("row", "head", "tile", "warpgroup"))
    num_steps, shape = counts[b, i] * rule.parts, (_R, rule.part)

    def first_key(at: Any) -> Any:
        tile = lax.shift_right_logical(tiles[b, i, lax.div(at, jnp.int32(rule.parts))], jnp.int32(1))
        return tile * BLOCK + lax.rem(at, jnp.int32(rule.parts)) * rule.part

    @pl.when(wg < 2)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        first_q = i * BLOCK + wg * _R
        at_rows = (b, pl.ds(first_q, _R), n)
        own_q, own_do = _load_rows(wg, (q.at[at_rows], do.at[at_rows]), (q_s, do_s), rows_ready)
        lse_R = rule.load(lse.at[b, n, pl.ds(first_q, _R)], _OF_ROWS)
        delta_R = rule.load(delta.at[b, n, pl.ds(first_q, _R)], _OF_ROWS)

        def step(at: Any, dq_RH: jax.Array) -> jax.Array:
            slot, first_k = lax.rem(at, jnp.int32(rule.stages)), first_key(at)
            full = lax.rem(tiles[b, i, lax.div(at, jnp.int32(rule.parts))], jnp.int32(2)) == 1

            tests = rule.tests(sight, b, lambda: sight[1][b, i] * BLOCK + wg * _R, first_k, shape, 0)

            plgpu.barrier_wait(ready.at[slot])
            s_RC = rule.where_visible(full, rule.capped(rule.product(own_q, k_s.at[slot])), tests)
            p_RC = jnp.exp2(s_RC - _across(lse_R, shape, 0)) * rule.slope(s_RC)
            ds_RC = p_RC * rule.product(own_do, v_s.at[slot], less=_across(delta_R, shape, 0))
            dq_RH = rule.add_product(dq_RH, ds_RC, k_s.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return dq_RH

        dq_RH = lax.fori_loop(0, num_steps, step, rule.zeros(_R, rule.head_dim))
        _store(own_q, dq_RH, dq.at[at_rows])

    @pl.when(wg == 2)
    def _() -> None:
        kv_head = lax.div(n, jnp.int32(rule.num_groups))

        def copy(at: Any, slot: Any) -> None:
            source = (b, pl.ds(first_key(at), rule.part), kv_head)
            plgpu.copy_gmem_to_smem(k.at[source], k_s.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(v.at[source], v_s.at[slot], ready.at[slot])

        _ring(rule.stages, num_steps, free, copy)


def _dkv_kernel(rule: _Rule, *refs: Any) -> None:
    sight, refs = refs[: rule.num_sight], refs[rule.num_sight :]
    q, k, v, do, lse, delta, tiles, counts, dk, dv, *scratch = refs
    k_s, v_s, q_s, do_s, lse_s, delta_s, rows_ready, ready, free = scratch
    b, n, j, wg = (lax.axis_index(name) for name in ("row", "head", "tile", "warpgroup"))
    per_tile, shape = rule.num_groups * rule.parts, (_R, rule.part)
    num_steps = counts[b, j] * per_tile

    def source(at: Any) -> tuple[Any, Any, Any]:
        """(first query, query head, whether the whole tile is visible): all heads of a tile, one after another."""
        code, part = tiles[b, j, lax.div(at, jnp.int32(per_tile))], lax.rem(at, jnp.int32(per_tile))
        first_q = lax.shift_right_logical(code, jnp.int32(1)) * BLOCK + lax.rem(part, jnp.int32(rule.parts)) * rule.part
        head = n * rule.num_groups + lax.div(part, jnp.int32(rule.parts))
        return first_q, head, lax.rem(code, jnp.int32(2)) == 1

    @pl.when(wg < 2)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        first_k = j * BLOCK + wg * _R
        at_rows = (b, pl.ds(first_k, _R), n)
        own_k, own_v = _load_rows(wg, (k.at[at_rows], v.at[at_rows]), (k_s, v_s), rows_ready)

        def step(at: Any, carry: tuple) -> tuple:
            dk_RH, dv_RH = carry
            slot, (first_q, _, full) = lax.rem(at, jnp.int32(rule.stages)), source(at)

            def place() -> Any:
                tile = sight[1][b, lax.div(first_q, jnp.int32(BLOCK))]
                return tile * BLOCK + lax.rem(first_q, jnp.int32(BLOCK))

            tests = rule.tests(sight, b, place, first_k, shape, 1)

            plgpu.barrier_wait(ready.at[slot])
            # The order keeps few numbers in registers: lse and delta come when needed, scores go when used.
            s_RC = rule.where_visible(full, rule.capped(rule.product(own_k, q_s.at[slot])), tests)
            p_RC = jnp.exp2(s_RC - _across(rule.load(lse_s.at[slot], _OF_COLUMNS), shape, 1))
            narrow_p_RC, p_RC = p_RC.astype(rule.dtype), p_RC * rule.slope(s_RC)
            dv_RH = rule.add_product(dv_RH, narrow_p_RC, do_s.at[slot])
            delta_RC = _across(rule.load(delta_s.at[slot], _OF_COLUMNS), shape, 1)
            ds_RC = p_RC * rule.product(own_v, do_s.at[slot], less=delta_RC)
            dk_RH = rule.add_product(dk_RH, ds_RC, q_s.at[slot])
            # lse and delta were read by the warpgroup itself, and a copy will overwrite them.
            plgpu.commit_smem()
            plgpu.barrier_arrive(free.at[slot])
            return dk_RH, dv_RH

        zeros = rule.zeros(_R, rule.head_dim)
        dk_RH, dv_RH = lax.fori_loop(0, num_steps, step, (zeros, zeros))
        _store(own_k, dk_RH, dk.at[at_rows])
        _store(own_v, dv_RH, dv.at[at_rows])

    @pl.when(wg == 2)
    def _() -> None:
        def copy(at: Any, slot: Any) -> None:
            first_q, head, _ = source(at)
            for x, smem in ((q, q_s), (do, do_s)):
                plgpu.copy_gmem_to_smem(x.at[b, pl.ds(first_q, rule.part), head], smem.at[slot], ready.at[slot])
            for x, smem in ((lse, lse_s), (delta, delta_s)):
                plgpu.copy_gmem_to_smem(x.at[b, head, pl.ds(first_q, rule.part)], smem.at[slot], ready.at[slot])

        _ring(rule.stages, num_steps, free, copy)


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: TiledMask, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] and log-sum-exp f32[B, T, N], as `reference.attention_with_lse`."""
    rule = _rule(mask, q_BTNH, k_BSKH, _FORWARD_STAGES, scale, softcap)
    q, k, v = _padded(_queries(mask), q_BTNH), *(_padded(mask.end_BS.shape[1], x) for x in (k_BSKH, v_BSKH))
    (B, T, N, H), (sight, k_lists, _) = q.shape, _lists(mask)
    kernel = _kernel(
        rule,
        _forward_kernel,
        (B, N, T // BLOCK),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        [
            rule.shared(2, _R, H),
            rule.shared(rule.stages, BLOCK, H),
            rule.shared(rule.stages, BLOCK, H),
            plgpu.SMEM((2, _R), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=rule.stages),
            plgpu.Barrier(num_barriers=rule.stages),
            plgpu.Barrier(num_barriers=rule.stages, num_arrivals=2),
        ],
    )
    o_BTNH, lse_BNT = kernel(*sight, q, k, v, *k_lists)
    return o_BTNH[:, : q_BTNH.shape[1]], lse_BNT.swapaxes(1, 2)[:, : q_BTNH.shape[1]]


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
    rule = _rule(mask, q_BTNH, k_BSKH, mask.stages, scale, softcap)
    # A row that sees nothing gets weights of 2 ** -1e15 = 0.
    lse_BTN = jnp.where(jnp.isfinite(lse_BTN), lse_BTN * _LOG2_E, _INVISIBLE)
    q, do = (_padded(_queries(mask), x) for x in (q_BTNH, do_BTNH.astype(q_BTNH.dtype)))
    k, v = (_padded(mask.end_BS.shape[1], x) for x in (k_BSKH, v_BSKH))
    numbers = [_padded(_queries(mask), x[..., None])[..., 0].swapaxes(1, 2) for x in (lse_BTN, delta_BTN)]
    (B, T, N, H), (S, K), (sight, k_lists, q_lists) = q.shape, k.shape[1:3], _lists(mask)
    dq_type, dk_type = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))

    def kept(rule: _Rule) -> list:
        return [rule.shared(2, _R, H)] * 2 + [rule.shared(rule.stages, rule.part, H)] * 2

    def barriers(rule: _Rule, num_copies: int) -> list:
        ready = plgpu.Barrier(num_barriers=rule.stages, num_arrivals=num_copies)
        free = plgpu.Barrier(num_barriers=rule.stages, num_arrivals=2)
        return [plgpu.Barrier(num_barriers=2, num_arrivals=2), ready, free]

    kernel = _kernel(rule, _dq_kernel, (B, N, T // BLOCK), (dq_type,), [*kept(rule), *barriers(rule, 2)])
    (dq,) = kernel(*sight, q, k, v, do, *numbers, *k_lists)
    rule = _narrowed(rule)
    scratch = [*kept(rule), *[plgpu.SMEM((rule.stages, rule.part), jnp.float32)] * 2, *barriers(rule, 4)]
    kernel = _kernel(rule, _dkv_kernel, (B, K, S // BLOCK), (dk_type, dk_type), scratch)
    dk, dv = kernel(*sight, q, k, v, do, *numbers, *q_lists)
    return dq[:, : q_BTNH.shape[1]], dk[:, : k_BSKH.shape[1]], dv[:, : k_BSKH.shape[1]]


def _rule(
    mask: TiledMask, q_BTNH: jax.Array, k_BSKH: jax.Array, stages: int, scale: float, softcap: float | None
) -> _Rule:
    (N, H), K = q_BTNH.shape[2:], k_BSKH.shape[2]
    return _Rule(scale, softcap, N // K, q_BTNH.dtype, H, stages, interpreted(), mask.window)


def _narrowed(rule: _Rule) -> _Rule:
    """For the gradients of k and v: quarters of tiles, where beside two accumulators halves leave no registers."""
    if FRUGAL or rule.head_dim <= 64 or (rule.softcap is None and rule.window is None):
        return rule
    return replace(rule, part=rule.part // 2, stages=rule.stages * 2)


def _kernel(rule: _Rule, body: Any, grid: tuple[int, int, int], out_type: Any, scratch_types: list) -> Any:
    return plgpu.kernel(
        update_wrapper(partial(body, rule), body),
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=("row", "head", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _queries(mask: TiledMask) -> int:
    """Queries at hand, in whole tiles."""
    return mask.place_BI.shape[1] * BLOCK


def _padded(num_tokens: int, x_BTNH: jax.Array) -> jax.Array:
    """Zeros up to there."""
    return jnp.pad(x_BTNH, ((0, 0), (0, num_tokens - x_BTNH.shape[1]), (0, 0), (0, 0)))


def _lists(mask: TiledMask) -> tuple[tuple, tuple, tuple]:
    """(who sees whom; of query tiles and of key tiles: (2 * tile + 1 if it is wholly visible, how many))"""

    def coded(tiles: jax.Array, full: jax.Array) -> jax.Array:
        return 2 * tiles + jnp.take_along_axis(full, tiles, axis=2)

    sight = (mask.end_BS, mask.place_BI) if mask.window is None else (mask.end_BS, mask.place_BI, mask.depth_BS)
    k_lists = (coded(mask.k_tiles_BIJ, mask.full_BIJ), mask.num_k_BI)
    return sight, k_lists, (coded(mask.q_tiles_BJI, mask.full_BIJ.swapaxes(1, 2)), mask.num_q_BJ)

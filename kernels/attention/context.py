"""Attention of rows that lie spread over a mesh axis: keys and values travel, queries stay.

Devices would wait for each other if each held a contiguous part of a row, for later queries see more. So the tiles of
a row are dealt out by how many key tiles they see, and tokens lie in that order (`balanced_order`, `reorder`). Every
device gathers all keys and values, which grouped-query attention keeps small, and computes its own queries; gradients
of keys and values are summed where they belong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from kernels.attention.api import BY_TILES, SAVED_NAME, check
from kernels.attention.choice import Implementation, Request, announce, choose
from kernels.attention.gradient import delta
from kernels.attention.reference import depths
from kernels.attention.tiles import TiledMask, active_tiles, tile
from kernels.compat import target
from kernels.tuning import Blocks, blocks

BLOCK = 256
"""Tokens of a piece that stays together, a tile of `balanced_order`; the kernels' tiles of queries divide it."""

Axes = str | tuple[str, ...] | None
"""Mesh axes that shard one axis of an array."""


def balanced_order(end_BT: Any, num_devices: int, *, window: int | None = None, block: int = BLOCK) -> jax.Array:
    """Which tile of each row comes at which place, so that all devices see about as many tiles; can be traced.

    The heaviest tile first, each to the device with the least work that still has room.

    Returns:
        i32[B, I]; device d holds the tiles order[:, d * I / num_devices : (d + 1) * I / num_devices].

    Raises:
        ValueError: rows that do not divide into tiles, or tiles into devices.
    """
    T = end_BT.shape[1]
    if T % (block * num_devices):
        raise ValueError(f"T={T} must be a multiple of block={block} x devices={num_devices}; pad rows with end 0")
    return _balanced_order(jnp.asarray(end_BT), num_devices, window, block)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _balanced_order(end_BT: jax.Array, num_devices: int, window: int | None, block: int) -> jax.Array:
    work_BI = active_tiles(end_BT, depths(end_BT), window, block, block).sum(-1)
    room = work_BI.shape[1] // num_devices

    def of_row(work_I: jax.Array) -> jax.Array:
        def give(held: tuple[jax.Array, jax.Array], work: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            num_tiles, load = held
            device = jnp.argmin(jnp.where(num_tiles < room, load, jnp.iinfo(load.dtype).max))
            return (num_tiles.at[device].add(1), load.at[device].add(work)), device

        nothing = jnp.zeros(num_devices, work_I.dtype)
        heaviest_first = jnp.argsort(-work_I, stable=True)
        _, device_of = jax.lax.scan(give, (nothing, nothing), work_I[heaviest_first])
        # Back in the order of the tiles, then by device; a device's own tiles stay in ascending order.
        return jnp.argsort(device_of[jnp.argsort(heaviest_first)], stable=True).astype(jnp.int32)

    return jax.vmap(of_row)(work_BI)


def reorder(x_BT: Any, order_BI: Any, *, inverse: bool = False) -> Any:
    """Tokens [B, T, ...] in the order of their tiles, NumPy or jax; `inverse` puts them back in place."""
    xp: Any = jnp if isinstance(x_BT, jax.Array) else np
    order_BI = xp.argsort(order_BI, axis=1) if inverse else order_BI
    B, num_tiles = order_BI.shape
    tiles = x_BT.reshape(B, num_tiles, -1)
    return xp.take_along_axis(tiles, order_BI[..., None], axis=1).reshape(x_BT.shape)


def context_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    end_BS: jax.Array,
    order_BI: jax.Array,
    scale: float,
    mesh: Mesh,
    axis: str = "context",
    rows: Axes = None,
    heads: Axes = None,
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """`attention` of rows whose tokens lie over a mesh axis in balanced order; differentiable in q, k and v.

    Every device of the mesh attends by itself for its own queries: XLA could not split a Pallas kernel.

    Args:
        q_BTNH: in the order of `order_BI`, as k, v and the result are.
        end_BS: i32, the mask in the rows' own order, whole along `axis`.
        order_BI: i32 of `balanced_order`, on the same mesh; the number of its tiles sets their size.
        rows: the mesh axes that shard rows.
        heads: those that shard heads, of queries and of keys alike.
        implementation: as in `attention`, one that goes tile by tile.

    Raises:
        ValueError: what `attention` refuses, rows or tiles that do not divide over the axis, or an unknown axis.
    """
    B, T, _, _ = q_BTNH.shape
    num_tiles = order_BI.shape[1]
    _check_axis(axis, mesh)
    if end_BS.shape != (B, T) or order_BI.shape[0] != B or T % num_tiles or num_tiles % mesh.shape[axis]:
        raise ValueError(
            f"end must be [B={B}, T={T}] and order [B={B}, tiles], T a multiple of tiles and tiles a multiple of "
            f"{axis}={mesh.shape[axis]}; got {end_BS.shape} and {order_BI.shape}"
        )
    check(q_BTNH, k_BSKH, v_BSKH, end_BS, softcap, window)
    path, reason, sizes = _choose(implementation, q_BTNH, num_tiles, mesh, axis, softcap, window)
    announce(path, reason)
    specs = _Specs(*(PartitionSpec(*of) for of in ((rows, axis, heads), (rows,), (rows, axis))))
    outputs: Any = _attend(
        q_BTNH, k_BSKH, v_BSKH, end_BS, order_BI, _Static(mesh, axis, specs, path, sizes, scale, softcap, window)
    )
    return outputs


def why(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct,
    *,
    order_BI: jax.Array | jax.ShapeDtypeStruct,
    mesh: Mesh,
    axis: str = "context",
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
) -> str:
    """One line: the path that `context_attention` takes for these arguments, and the reason.

    Raises:
        ValueError: an unknown axis, or an explicit implementation that cannot serve the request.
    """
    _check_axis(axis, mesh)
    path, reason, _ = _choose(implementation, q_BTNH, order_BI.shape[1], mesh, axis, softcap, window)
    return f"{path}: {reason}"


def _check_axis(axis: str, mesh: Mesh) -> None:
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r}; allowed: the mesh's axes, {', '.join(map(repr, mesh.shape))}")


def _choose(
    implementation: Implementation,
    q: jax.Array | jax.ShapeDtypeStruct,
    num_tiles: int,
    mesh: Mesh,
    axis: str,
    softcap: float | None,
    window: int | None,
) -> tuple[Implementation, str, Blocks]:
    """(path, reason, sizes of its tiles), on one of the mesh's devices by itself."""
    _, T, _, H = q.shape
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        here = target()._replace(split=False)
    sizes, num_queries = blocks(here, T).within(T // num_tiles), T // mesh.shape[axis]
    request = Request(T, H, str(q.dtype), False, window, softcap, False, sizes.q, sizes.k, here, num_queries)
    return *choose(implementation, request), sizes


class _Specs(NamedTuple):
    """How arrays lie on the mesh."""

    heads: PartitionSpec  # [B, T, N, ...]
    end: PartitionSpec  # [B, S]
    order: PartitionSpec  # [B, I]


class _Static(NamedTuple):
    """What is known when a function is traced."""

    mesh: Mesh
    axis: str
    specs: _Specs
    path: str
    blocks: Blocks
    scale: float
    softcap: float | None
    window: int | None

    def on_devices(self, function: Callable[..., Any], num_arguments: int, num_results: int) -> Callable[..., Any]:
        """`function` of (end, order, arrays [B, T, N, ...] ...) on each device's part of them."""
        heads, end, order = self.specs
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(end, order, *[heads] * num_arguments),
            out_specs=(heads,) * num_results,
            check_vma=False,
        )

    def tiled(self, end_BS: jax.Array, order_BI: jax.Array, num_queries: int) -> TiledMask:
        """The mask of the queries at hand, `order` cut into the kernels' tiles."""
        block_q, block_k, stages = self.blocks
        num_parts = num_queries // order_BI.shape[1] // block_q
        place_BI = (order_BI[..., None] * num_parts + jnp.arange(num_parts)).reshape(len(order_BI), -1)
        sizes = {"block_q": block_q, "block_k": block_k, "stages": stages}
        return tile(end_BS, window=self.window, **sizes, place_BI=place_BI.astype(jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, order: jax.Array, static: _Static) -> jax.Array:
    return _attend_forward(q, k, v, end, order, static)[0]


# Forward and backward are each mapped over devices by themselves: nothing is differentiated through a collective.
def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, order: jax.Array, static: _Static
) -> tuple[jax.Array, tuple]:
    def of_device(end: jax.Array, order: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        mask = static.tiled(end, order, q.shape[1])
        k, v = (_gather(x, order, static.axis) for x in (k, v))
        return BY_TILES[static.path].forward(q, k, v, mask, static.scale, static.softcap)

    o, lse = checkpoint_name(static.on_devices(of_device, 3, 2)(end, order, q, k, v), SAVED_NAME)
    return o, (q, k, v, end, order, o, lse)


def _attend_backward(static: _Static, saved: tuple, do: jax.Array) -> tuple:
    def of_device(end: jax.Array, order: jax.Array, *tokens: jax.Array) -> tuple:
        q, k, v, o, lse, do = tokens
        mask = static.tiled(end, order, q.shape[1])
        whole_k, whole_v = (_gather(x, order, static.axis) for x in (k, v))
        dq, dk, dv = BY_TILES[static.path].backward(
            q, whole_k, whole_v, mask, static.scale, static.softcap, lse, do, delta(o, do, jnp.zeros_like(lse))
        )
        dk, dv = (_scatter_sum(x, order, static.axis) for x in (dk, dv))
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    q, k, v, end, order, o, lse = saved
    dq, dk, dv = static.on_devices(of_device, 6, 3)(end, order, q, k, v, o, lse, do)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _gather(x_BTKH: jax.Array, order_BI: jax.Array, axis: str) -> jax.Array:
    """Of all devices together, in the rows' own order."""
    x_BSKH, whole_order_BI = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (x_BTKH, order_BI))
    return reorder(x_BSKH, whole_order_BI, inverse=True)


def _scatter_sum(x_BSKH: jax.Array, order_BI: jax.Array, axis: str) -> jax.Array:
    """The sum over devices, to each the tokens that it holds."""
    whole_order_BI = jax.lax.all_gather(order_BI, axis, axis=1, tiled=True)
    return jax.lax.psum_scatter(reorder(x_BSKH, whole_order_BI), axis, scatter_dimension=1, tiled=True)

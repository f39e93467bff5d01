"""Rows spread over devices: the same numbers as on one, and work dealt out evenly."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import context
from kernels.attention.context import balanced_order, reorder
from kernels.shapes import MASKS
from tests.kernels.oracle import forests, sees

BLOCK = 4
seeded = settings(derandomize=True, deadline=None, max_examples=50)


def work(end_T, order_I, num_devices):
    """Visible tiles of each device, counted from the dense mask."""
    num_tiles = len(order_I)
    seen = sees(end_T).reshape(num_tiles, BLOCK, num_tiles, BLOCK).any((1, 3)).sum(1)
    return seen[order_I].reshape(num_devices, -1).sum(1)


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("num_devices", [4, 8])
def test_work_is_balanced_where_contiguous_parts_are_not(case, num_devices):
    end = MASKS[case](64 * BLOCK)
    (order,) = balanced_order(end[None], num_devices, block=BLOCK)
    balanced, naive = work(end, order, num_devices), work(end, np.arange(64), num_devices)
    assert balanced.max() <= 1.05 * balanced.mean()
    assert naive.max() > 1.1 * naive.mean()


@given(forests(8 * BLOCK), st.sampled_from([1, 2, 4, 8]))
@seeded
def test_every_tile_is_held_once_and_devices_hold_equally_many(forest, num_devices):
    end, _ = forest
    (order,) = balanced_order(end[None], num_devices, block=BLOCK)
    assert sorted(order.tolist()) == list(range(8))
    tokens = np.arange(8 * BLOCK * 3).reshape(1, 8 * BLOCK, 3)
    moved = reorder(tokens, order[None])
    np.testing.assert_array_equal(moved[0, :BLOCK], tokens[0, order[0] * BLOCK : (order[0] + 1) * BLOCK])
    np.testing.assert_array_equal(reorder(moved, order[None], inverse=True), tokens)


def test_why_refuses_an_unknown_axis():
    mesh = jax.make_mesh((1,), ("data",))
    q, order = jax.ShapeDtypeStruct((1, 512, 4, 64), "float32"), jax.ShapeDtypeStruct((1, 2), "int32")
    with pytest.raises(ValueError, match="axis='context'; allowed: the mesh's axes, 'data'"):
        context.why(q, order_BI=order, mesh=mesh)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="T=40 must be a multiple of block=4 x devices=4"):
        balanced_order(np.zeros((1, 40), np.int32), 4, block=4)


SPREAD = """
import contextlib, logging, sys
import jax, jax.numpy as jnp, numpy as np
(num_data, num_context), path = map(int, sys.argv[1:3]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", num_data * num_context)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.experimental.pallas import tpu as pltpu
from kernels.attention import context
from kernels.attention.api import attention
from kernels.attention.context import balanced_order, context_attention, reorder
from kernels.compat import Target
from kernels.shapes import packed, shared_prompt
from kernels.tuning import Blocks

B, T, N, K, H, BLOCK = 2, 128, 4, 2, 8, 8
run_kernels = contextlib.nullcontext
if path == "pallas_tpu":  # interpreted, as if these devices were TPUs
    run_kernels = lambda: pltpu.force_tpu_interpret_mode(True)
    H, BLOCK, T = 64, 256, 256 * num_context
    context.target = lambda: Target("tpu", "TPU v5 lite", True)
    context.blocks = lambda target, num_tokens: Blocks(128, 512)
logging.basicConfig(level=logging.INFO)
rng = np.random.default_rng(0)
q, k, v, w = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
end = np.stack([packed(T), shared_prompt(T)])
end[0, T - 8:] = 0  # padding
end[0] = np.minimum(end[0], T - 8)
order = balanced_order(end, num_context, block=BLOCK)
mesh = jax.make_mesh((num_data, num_context), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
rows, tokens = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data", "context"))

for window, softcap in ((None, None), (9, 2.0)):
    def plain(q, k, v):
        o = attention(q, k, v, mask=end, scale=0.3, window=window, softcap=softcap, implementation="reference")
        return jnp.sum(w * o), o
    def spread(q, k, v, w, end, order):
        lies = {"end_BS": end, "order_BI": order, "mesh": mesh, "rows": "data"}
        o = context_attention(q, k, v, **lies, scale=0.3, window=window, softcap=softcap)
        return jnp.sum(w * o), o
    gradients, o = jax.jit(jax.grad(plain, (0, 1, 2), has_aux=True))(q, k, v)
    run = jax.jit(jax.grad(spread, (0, 1, 2), has_aux=True), out_shardings=tokens)
    inputs = [jax.device_put(reorder(x, order), tokens) for x in (q, k, v, w)]
    with run_kernels():
        print(context.why(q, order_BI=order, mesh=mesh, window=window, softcap=softcap))
        got_gradients, got = run(*inputs, jax.device_put(end, rows), jax.device_put(order, tokens))
    for one, many in zip((o, *gradients), (got, *got_gradients), strict=True):
        assert many.sharding.is_equivalent_to(tokens, 4)
        np.testing.assert_allclose(reorder(np.asarray(many), order, inverse=True), one, rtol=0, atol=4e-5 * max(1, np.abs(one).max()))
try:
    context_attention(q, k, v, end_BS=end, order_BI=order[:, :1], scale=1.0, mesh=mesh)
    raise AssertionError("one tile was spread over many devices")
except ValueError as error:
    assert f"tiles a multiple of context={num_context}" in str(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_data", "num_context", "path"),
    [(2, 4, "xla_chunked"), (1, 4, "xla_chunked"), (1, 8, "xla_chunked"), (1, 4, "pallas_tpu")],
)
def test_devices_together_compute_what_one_does(num_data, num_context, path):
    """Outputs and gradients of a packed row with padding and of a shared prompt, rows sharded beside them or not."""
    command = [sys.executable, "-c", SPREAD, str(num_data), str(num_context), path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    [why] = set(done.stdout.splitlines())
    assert why.startswith(f"{path}: ")
    assert f"attention takes {why}\n" in done.stderr


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kernels.attention.api import attention
from kernels.attention.tiles import tile
from kernels.shapes import packed, shared_prompt
B, T, N, K, H = 2, 128, 4, 2, 8
rng = np.random.default_rng(0)
q, k, v, w = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
end = np.stack([packed(T), shared_prompt(T)])
def run(q, k, v, w, end, path):
    def loss(q, k, v):
        mask = tile(end, block_q=16, block_k=16) if path == "xla_chunked" else end
        return jnp.sum(w * attention(q, k, v, mask=mask, scale=0.3, implementation=path))
    return jax.grad(loss, (0, 1, 2))(q, k, v)
expected = jax.jit(run, static_argnums=5)(q, k, v, w, end, "reference")
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
heads, rows = NamedSharding(mesh, P("data", None, "tensor")), NamedSharding(mesh, P("data"))
places = (*[heads] * 4, rows)
jitted = jax.jit(lambda *a: run(*a, "xla_chunked"), in_shardings=places, out_shardings=heads)
program = jitted.lower(q, k, v, w, end).compile()
got = program(*map(jax.device_put, (q, k, v, w, end), places))
for one, many in zip(expected, got, strict=True):
    np.testing.assert_allclose(many, one, rtol=0, atol=4e-5)
moved = ("all-gather(", "all-to-all(", "collective-permute(", "reduce-scatter(", "all-reduce(")
travels = [line for line in program.as_text().splitlines() if any(f" {name}" in line for name in moved)]
assert all(" = (s32[8]{0}, s32[8]{0}) all-reduce(" in line or " = s32[8]{0} all-reduce(" in line for line in travels), travels
"""


def test_rows_and_heads_that_xla_shards_stay_where_they_are():
    """The plain call on four devices: the same gradients, and only how many tiles a loop visits travels."""
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr

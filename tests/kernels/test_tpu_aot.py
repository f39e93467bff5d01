"""The TPU kernels compiled by libtpu for TPUs that are not here, at Qwen3-8B's heads."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jorch.model.attention import packed_rows
from jorch.sharding import MESH_AXES, sharding
from kernels import tune
from kernels.attention.api import attention
from kernels.shapes import QWEN3_8B
from kernels.tuning import Blocks
from tests.kernels.devices import compile_for, for_one_of, tpu_devices

pytestmark = pytest.mark.tpu_aot
N, K = 32, 8


def compile_gradient(topology, num_tokens, H=128, dtype="bfloat16", softcap=None, window=None):
    """Forward and backward of packed rows under a mask known on device only."""

    def loss(q, k, v, end):
        options = {"softcap": softcap, "window": window, "implementation": "pallas_tpu"}
        o = attention(q, k, v, mask=end, scale=H**-0.5, **options)
        return jnp.sum(o.astype(jnp.float32))

    heads = [((1, num_tokens, n, H), dtype) for n in (N, K, K)]
    gradient = jax.value_and_grad(loss, (0, 1, 2))
    return compile_for(tpu_devices(topology), gradient, *heads, ((1, num_tokens), "int32"))


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_all_three_kernels_compile(topology):
    text = compile_gradient(topology, 8192).as_text()
    for kernel in ("forward_kernel", "dq_kernel", "dkv_kernel"):
        assert kernel in text


@pytest.mark.parametrize(
    ("H", "dtype", "softcap", "window"),
    [(64, "bfloat16", None, 100), (256, "bfloat16", 30.0, None), (192, "float32", None, 512)],
)
def test_head_dims_dtypes_and_windows(H, dtype, softcap, window):
    compile_gradient("v5e:2x2", 1000, H, dtype, softcap, window)


def test_long_rows_fit():
    """128k tokens in the memory of one v5e: scratch of a few copies of the queries, where one head's dense scores
    would take 64."""
    num_tokens = 131072
    scratch = compile_gradient("v5e:2x2", num_tokens).memory_analysis().temp_size_in_bytes
    assert scratch < 4 * (2 * num_tokens * N * 128)


@pytest.mark.parametrize("num_context", [1, 2])
def test_every_device_of_a_mesh_attends_for_its_own_rows_and_heads(num_context):
    """The model's attention over sixteen devices: XLA by itself would refuse to split the kernel.

    Where two devices share a row, nothing is gathered that is larger than a device's keys.
    """
    devices = np.array(tpu_devices("v5e:4x4")).reshape(1, 8 // num_context, num_context, 2)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def loss(q, k, v, end):
        return jnp.sum(packed_rows(end, 128, mesh).attend(q, k, v).astype(jnp.float32))

    def of(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, shape, axes))

    q, k = (of((8, 1024, n, 128), "bfloat16", "rows", "length", "heads", "head_dim") for n in (N, K))
    end = of((8, 1024), "int32", "rows", "length")
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, end).lower().compile()
    text = compiled.as_text()
    assert all(kernel in text for kernel in ("forward_kernel", "dq_kernel", "dkv_kernel"))
    gathers = "\n".join(line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", gathers)]
    assert max(sizes, default=0) <= (num_context - 1) * (num_context * 1024 * K // 2 * 128)


def test_the_tuner_prunes_what_exceeds_vmem():
    with for_one_of(tpu_devices("v5e:2x2")) as place:
        fits, too_large = (tune.compiled(8192, QWEN3_8B, Blocks(n, n), place) for n in (512, 2048))
    assert fits.refusal is None
    assert "vmem" in too_large.refusal.lower()

"""The Hopper kernels compiled to machine code by CUDA's own assembler, at Qwen3-8B's heads; no GPU."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jorch.model.attention import packed_rows
from jorch.plan.gpus import gpu_devices
from jorch.sharding import MESH_AXES, sharding
from kernels import tune
from kernels.attention import pallas_mosaic_gpu
from kernels.attention.choice import log_once
from kernels.attention.tiles import tile
from kernels.compat import target
from kernels.shapes import QWEN3_8B
from tests.kernels.devices import compile_for, for_one_of, h100_devices

pytestmark = pytest.mark.sm90_aot
N, K, T = 32, 8, 8192


def assemble(capfd, monkeypatch, H, softcap, dtype="bfloat16", window=None, num_parts=1):
    """What the assembler and the disassembler print of forward and backward.

    With `num_parts` the queries at hand are that part of a row's, at places known on device only.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_SASS", "1")

    def both(q, k, v, end, place):
        mask = tile(end, window=window, place_BI=place)
        o, lse = pallas_mosaic_gpu.forward(q, k, v, mask, H**-0.5, softcap)
        return o, pallas_mosaic_gpu.backward(q, k, v, mask, H**-0.5, softcap, lse, o, jnp.zeros_like(lse))

    heads = [((1, n, of, H), dtype) for n, of in ((T // num_parts, N), (T, K), (T, K))]
    place = ((1, T // num_parts // pallas_mosaic_gpu.BLOCK), "int32")
    compile_for(h100_devices(), both, *heads, ((1, T), "int32"), place)
    printed = capfd.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize(
    ("softcap", "window", "num_parts"), [(None, None, 1), (30.0, None, 1), (None, 4096, 4), (30.0, 4096, 4)]
)
@pytest.mark.parametrize("H", [64, 128])
def test_no_spills_and_tensor_cores(capfd, monkeypatch, H, softcap, window, num_parts):
    text = assemble(capfd, monkeypatch, H, softcap, window=window, num_parts=num_parts)
    spills = {
        name: int(stored)
        for name, stored in re.findall(
            r"Function properties for (_\w+?)_mosaic_gpu_kernel\s+\d+ bytes stack frame, (\d+) bytes spill stores", text
        )
    }
    assert spills.keys() == {"_forward_kernel", "_dq_kernel", "_dkv_kernel"}
    assert not any(spills.values()), spills
    # Two products forward; three for q; four for k and v.
    assert len(re.findall(r"HGMMA\.64x\d+x16\.F32\.BF16", text)) >= (2 + 3 + 4) * 4


def test_devices_that_share_rows_take_the_kernels(caplog):
    """The model's attention over four GPUs, two of them to a row, as XLA would run it there."""
    mesh = Mesh(np.array(gpu_devices("h100", 4)).reshape(1, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def loss(q, k, v, end):
        return jnp.sum(packed_rows(end, 128, mesh).attend(q, k, v).astype(jnp.float32))

    def of(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, shape, axes))

    q, k = (of((2, 1024, n, 128), "bfloat16", "rows", "length", "heads", "head_dim") for n in (N, K))
    end = of((2, 1024), "int32", "rows", "length")
    log_once.cache_clear()
    with jax.set_mesh(mesh), caplog.at_level(logging.INFO, "kernels"):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, end).lower().compile().as_text()
    assert "attention takes pallas_mosaic_gpu: " in caplog.text
    assert text.count("mosaic_gpu_v2") >= 3


def test_float16(capfd, monkeypatch):
    text = assemble(capfd, monkeypatch, 64, None, "float16")
    assert re.search(r"HGMMA\.64x\d+x16\.F32 ", text)
    assert "HGMMA" in text
    assert "BF16" not in "".join(re.findall(r"HGMMA\S*", text))


def test_the_tuner_prunes_by_shared_memory_and_spills():
    """Four halves of tiles under way fit into shared memory beside a block's own rows, five do not."""
    with for_one_of(h100_devices()) as place:
        found = tune.pruned([tune.compiled(T, QWEN3_8B, blocks, place) for blocks in tune.candidates(target(), T)])
    four, *others, five = found
    assert (four.blocks.stages, four.refusal, four.spilled_bytes) == (4, None, 0)
    assert "shared memory" in five.refusal
    for one in others:
        assert (one.program is None) == bool(one.refusal) == (one.spilled_bytes > 0)

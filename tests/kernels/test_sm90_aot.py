"""The Hopper kernels compiled to machine code by CUDA's own assembler, at Qwen3-8B's heads; no GPU."""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels import tune
from kernels.attention.api import attention
from kernels.compat import target
from kernels.shapes import QWEN3_8B
from tests.kernels.devices import compile_for, for_one_of, h100_devices

pytestmark = pytest.mark.sm90_aot
N, K, T = 32, 8, 8192

CAPPED_SPILLS = 32
"""Bytes that a thread of the gradient of k and v stores away at H=128 with a softcap where jax is older than 0.12."""


def assemble(capfd, monkeypatch, H, softcap, dtype="bfloat16"):
    """What the assembler and the disassembler print of forward and backward."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_SASS", "1")

    def loss(q, k, v, end):
        o = attention(q, k, v, mask=end, scale=H**-0.5, softcap=softcap, implementation="pallas_mosaic_gpu")
        return jnp.sum(o.astype(jnp.float32))

    heads = [((1, T, n, H), dtype) for n in (N, K, K)]
    compile_for(h100_devices(), jax.value_and_grad(loss, (0, 1, 2)), *heads, ((1, T), "int32"))
    printed = capfd.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("H", [64, 128])
def test_no_spills_and_tensor_cores(capfd, monkeypatch, H, softcap):
    text = assemble(capfd, monkeypatch, H, softcap)
    spills = {
        name: int(stored)
        for name, stored in re.findall(
            r"Function properties for (_\w+?)_mosaic_gpu_kernel\s+\d+ bytes stack frame, (\d+) bytes spill stores", text
        )
    }
    assert spills.keys() == {"_forward_kernel", "_dq_kernel", "_dkv_kernel"}
    most = CAPPED_SPILLS if H == 128 and softcap and jax.__version_info__ < (0, 12) else 0
    assert spills.pop("_dkv_kernel") <= most
    assert not any(spills.values()), spills
    # Two products forward; three for q; four for k and v.
    assert len(re.findall(r"HGMMA\.64x\d+x16\.F32\.BF16", text)) >= (2 + 3 + 4) * 4


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

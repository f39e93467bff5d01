"""The shapes that benchmarks measure: Qwen3-8B's on an accelerator, small ones on a CPU."""

from typing import NamedTuple

import numpy as np

from kernels.attention.mask import segment_ends, tree_ends


class Shapes(NamedTuple):
    """Sizes of one device kind; letters as everywhere: N, K heads, H head dim, D model, V vocabulary."""

    attention_tokens: tuple[int, ...]
    N: int
    K: int
    H: int
    logprob_tokens: int
    D: int
    V: int
    dtype: str


QWEN3_8B = Shapes((4096, 8192, 32768, 131072), 32, 8, 128, 32768, 4096, 151936, "bfloat16")
SMALL = Shapes((1024, 2048), 4, 1, 64, 4096, 64, 4096, "float32")

GROUP = 8


def causal(num_tokens: int) -> np.ndarray:
    """`end` i32[T] of one sequence."""
    return np.full(num_tokens, num_tokens, np.int32)


def packed(num_tokens: int) -> np.ndarray:
    """`end` i32[T] of segments whose lengths vary six-fold, as in a 64k row of 4k to 24k."""
    weights = np.array([4, 24, 7, 13, 5, 11])
    stops = np.cumsum(weights) * num_tokens // weights.sum()
    return segment_ends(1 + np.searchsorted(stops, np.arange(num_tokens), side="right"))


def shared_prompt(num_tokens: int) -> np.ndarray:
    """`end` i32[T] of a prompt with eight answers, each half as long as the prompt; the last takes what is left."""
    answer = num_tokens // (GROUP + 2)
    lengths = [2 * answer, *[answer] * (GROUP - 1), num_tokens - (GROUP + 1) * answer]
    return tree_ends(lengths, [-1] + [0] * GROUP)


MASKS = {"causal": causal, "packed": packed, "shared-prompt": shared_prompt}

"""Block sizes of tiled attention."""

from kernels.compat import Target

LANES = 128


def blocks(target: Target, num_tokens: int) -> tuple[int, int]:
    """(queries, keys) of a tile: what suits the device, no more than the row needs."""
    if target.backend == "tpu":
        block = min(512, num_tokens + -num_tokens % LANES)
        return block, block
    return (128, 128) if target.backend == "gpu" else (256, 256)

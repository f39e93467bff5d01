"""A Hopper kernel whose copies do not wait until a slot of the ring is free, interpreted; status 0 once that is caught.

A process of its own: warpgroups that run past each other's barriers may wait for ever.
"""

import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from kernels.attention import pallas_mosaic_gpu
from kernels.attention.tiles import tile
from tests.kernels.devices import H100, gpu_memories, interpreted

T, H, TIME_LIMIT_S = 240, 64, 200.0


def heedless(stages, num_steps, free, copy):
    jax.lax.fori_loop(0, num_steps, lambda step, _: copy(step, jnp.int32(0)), None)


def play(caught: threading.Event) -> None:
    pallas_mosaic_gpu._FORWARD_STAGES, pallas_mosaic_gpu._ring = 1, heedless
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, 1, H)), jnp.bfloat16) for _ in range(3))
    mask = tile(jnp.full((1, T), T, jnp.int32), block_q=128, block_k=128)
    with interpreted(H100, gpu_memories()):
        try:
            jax.block_until_ready(pallas_mosaic_gpu.forward(q, k, v, mask, 0.12, None))
        except Exception as error:  # newer interpreters raise
            if "RACE DETECTED" in str(error) or "barrier" in str(error).lower():
                caught.set()


def found() -> bool:
    try:
        return interpret_pallas_call.get_races().races_found
    except AssertionError:  # nothing has been interpreted yet
        return False


if __name__ == "__main__":
    caught, deadline = threading.Event(), time.monotonic() + TIME_LIMIT_S
    thread = threading.Thread(target=play, args=(caught,), daemon=True)
    thread.start()
    while time.monotonic() < deadline:
        over = not thread.is_alive()
        if caught.is_set() or found():
            os._exit(0)  # without waiting for threads that never end
        if over:
            break
        time.sleep(0.2)
    os._exit(1)

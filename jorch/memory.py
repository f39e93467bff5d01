"""How the C library keeps memory that was freed."""

import ctypes
import sys

_M_MMAP_THRESHOLD, _THRESHOLD_BYTES = -3, 2**20
_M_ARENA_MAX, _MOST_ARENAS = -8, 2


def give_back_freed_blocks() -> None:
    """Large blocks go back to the system as soon as they are freed, until the process ends.

    glibc otherwise raises the size from which it does so with every such block, up to 32 MiB, and keeps smaller ones in
    a heap a thread: tensorstore's threads then hold as much as they ever read, and each of Orbax's loads leaves a
    thread. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
            mallopt(_M_ARENA_MAX, _MOST_ARENAS)

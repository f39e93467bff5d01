"""SIGTERM, which schedulers send some time before they take a machine: the run saves its state and ends.

The training loops ask after every step, in which nothing is left half done. Needs no jax before a loop runs.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM


class Terminated(Exception):
    """The run was told to end, has saved what it needs to go on, and ends."""


@contextmanager
def on_sigterm() -> Iterator[Callable[[int], bool]]:
    """A function that tells after step N, called with N = 1, 2, ..., whether to save and end now.

    In a run of several processes any of them may be told; all then get True for the same step, a later one.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        # jax listens for the signal itself, since the processes have joined.
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False  # Python lets nobody else listen for signals
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield lambda _: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)

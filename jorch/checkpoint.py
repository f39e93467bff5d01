"""Orbax checkpoints of a run: the train state and, beside it, what must match when it is restored.

Saving is asynchronous and atomic: a kill at any moment leaves the previous checkpoint. All randomness and the data
order are functions of (seed, step), so the step count is the whole of a run's position.
"""

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CoroutineType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jorch.config import CheckpointConfig
from jorch.run_folder import naming

_CHECKSUM = "checksum"


class Checkpoints:
    """The checkpoints under `folder`; a context manager that finishes the save in flight.

    A `read_only` view leaves alone what another process may be writing there.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False) -> None:
        policies = ocp.training
        self._folder = folder
        self._config = config
        with naming(folder):
            # Any: Orbax types the arguments too narrowly for its own policies.
            training: Any = ocp.training
            self._checkpointer = training.Checkpointer(
                folder.absolute(),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(config.every_steps),
                preservation_policy=policies.preservation_policies.LatestN(config.keep),
                cleanup_tmp_directories=not read_only,
            )

    def latest_step(self) -> int | None:
        """The number of the newest complete checkpoint, None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, meta: dict[str, Any], *, force: bool = False) -> None:
        """Start saving `state` (a pytree of global arrays) and `meta` (JSON) as step `step`.

        Returns as soon as the arrays are copied to the host, so the caller may donate them. Outside of the
        interval nothing happens unless `force` is set. Raises OSError naming the folder where this save cannot be
        written, or the one before it could not.
        """
        if self.latest_step() == step or not (force or step % self._config.every_steps == 0):
            return
        content = {"state": state, "meta": meta | {_CHECKSUM: int(_checksum(state))}}
        with naming(self._folder):
            self._checkpointer.save_checkpointables_async(step, content, force=force)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int]:
        """(state, meta, step) of the newest checkpoint, onto the shardings of `abstract_state`.

        Raises ValueError where it is damaged or belongs to another model.
        """
        step = self.latest_step()
        assert step is not None, "restore() without a checkpoint"
        reason = ""
        with _dropping_coroutines_silently():
            try:
                loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state, "meta": None})
            except Exception as error:
                loaded, reason = {}, _reason(error)
            if reason:
                _wait_for_readers()
        if reason:
            raise ValueError(self._unreadable(step, reason))
        state, meta = loaded["state"], loaded["meta"]
        if meta.pop(_CHECKSUM, None) != int(_checksum(state)):
            raise ValueError(self._unreadable(step, "its content does not match its checksum"))
        return state, meta, step

    def _unreadable(self, step: int, reason: str) -> str:
        before = [c.step for c in self._checkpointer.checkpoints if c.step < step]
        go_on = f"remove that folder to go on from step {before[-1]}, or " if before else ""
        return f"checkpoint {self._folder / str(step)} cannot be read ({reason}); {go_on}pass --fresh to start again"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a failure the first error is the one to report; a second one from closing would hide it.
        with contextlib.suppress(Exception) if error else naming(self._folder):
            self._checkpointer.close()


def base_meta(init_from: str | None, frozen: Any) -> dict[str, Any]:
    """What a checkpoint of an adapter says of its frozen base, which it does not hold; nothing where all is trained."""
    return {} if frozen is None else {"base": {"init_from": init_from, _CHECKSUM: int(_checksum(frozen))}}


def check_base(meta: dict[str, Any], init_from: str | None, frozen: Any) -> None:
    """Raises ValueError where an adapter was trained on other frozen parameters than these."""
    if frozen is not None and meta["base"][_CHECKSUM] != int(_checksum(frozen)):
        raise ValueError(
            f"init_from={init_from!r} holds other weights than those the adapter was trained on, which came from "
            f"{meta['base']['init_from']!r}; restore them there, or pass --fresh to start again"
        )


@jax.jit
def _checksum(state: Any) -> jax.Array:
    """A wrapping sum over the bits of all arrays: whatever their shardings, one changed element changes it.

    Tensorstore checks its own records, but not the arrays' bytes.
    """
    total = jnp.uint32(0)
    for number, array in enumerate(jax.tree.leaves(state), 1):
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        # Odd factors tell the arrays apart and lose no bit.
        total += jnp.sum(bits, dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
    return total


@contextlib.contextmanager
def _dropping_coroutines_silently() -> Iterator[None]:
    """Orbax leaves some behind where it cannot read: some complain when they go, and Python warns of the others."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = hook


def _wait_for_readers(timeout_s: float = 5.0) -> None:
    """Until Orbax's coroutines are gone: the first failed read ends a restore while the others are still under way."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        gc.collect()
        if not any(isinstance(o, CoroutineType) and "orbax" in o.cr_code.co_filename for o in gc.get_objects()):
            return
        time.sleep(0.02)


def _reason(error: BaseException) -> str:
    """What lay at the root, without the details that tensorstore appends."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0]
    return text[:200].rstrip() or type(error).__name__

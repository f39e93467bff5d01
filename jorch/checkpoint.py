"""Orbax checkpoints of a run: the train state and, beside it, what must match when it is restored.

    FOLDER/STEP/state     arrays: step, parameters, optimizer state
    FOLDER/STEP/meta      JSON: resolved config, model, tokenizer's digest, seed, data position, arrays' checksums
    FOLDER/STEP/metrics   JSON: the metric that picks the best one, where the config names it

Saving is asynchronous and atomic: a kill at any moment leaves the previous checkpoint. All randomness and the data
order are functions of (seed, step), so the seed and the step count are the whole of a run's position; the position in
Grain's order is written down beside them.
"""

import contextlib
import difflib
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CoroutineType, TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jorch.config import RlConfig, SftConfig
from jorch.metrics import METRICS
from jorch.run_folder import naming
from jorch.sections import CheckpointConfig, ModelConfig
from jorch.stored_arrays import StoredArrays, checksums, names_of, parts

_CHECKSUMS = "checksums"
"""Of every array; as text, since Orbax makes a file entry of every number."""
_CHECKSUM = "checksum"
"""Of all arrays together: what an adapter says of its base, and what states had before `_CHECKSUMS`."""
_CONCURRENT_BYTES = 8 * 2**30
"""Of host memory that tensorstore may have in flight beyond the arrays' own: a large state must not exhaust it."""


def describe(config: RlConfig | SftConfig, model: ModelConfig, tokenizer_digest: str) -> dict[str, Any]:
    """What is written beside every state of a run, and what a checkpoint must agree with in model and tokenizer."""
    return {
        "config": config.model_dump(mode="json"),
        "model": model.architecture(),
        "tokenizer_digest": tokenizer_digest,
        "seed": config.seed,
    }


class Checkpoints:
    """The checkpoints under `folder`; a context manager that finishes the save in flight.

    A `read_only` view leaves alone what another process may be writing there.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False) -> None:
        """Raises ValueError where the config's metric does not exist, OSError where the folder cannot be made."""
        self._folder = folder
        self._config = config
        _check_metric(config.best_metric)
        with naming(folder):
            # Any: Orbax types the arguments too narrowly for its own policies.
            training: Any = ocp.training
            self._checkpointer = training.Checkpointer(
                folder.absolute(),
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(config.every_steps),
                preservation_policy=_preservation(config),
                cleanup_tmp_directories=not read_only,
            )

    def latest_step(self) -> int | None:
        """The number of the newest complete checkpoint, None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def is_due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint at `step`."""
        return step % self._config.every_steps == 0

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> None:
        """Start saving `state` (a pytree of global arrays) and `meta` (JSON) as step `step`.

        Returns as soon as the arrays are copied to the host, so the caller may donate them. Outside of the interval
        nothing happens unless `force` is set. `metrics` are those of the step that made the state; without them it
        cannot become the best. Raises OSError naming the folder where this save cannot be written, or the one before
        it could not.
        """
        if self.latest_step() == step or not (force or self.is_due(step)):
            return
        ranked = _ranked(metrics, self._config.best_metric)
        content = {"state": state, "meta": meta | {_CHECKSUMS: json.dumps(checksums(state))}}
        with naming(self._folder), _context(state, self._config.ocdbt):
            self._checkpointer.save_checkpointables_async(step, content, metrics=ranked, force=force)

    def wait(self) -> None:
        """Until the save in flight is complete. Raises OSError naming the folder where it could not be written."""
        with naming(self._folder):
            self._checkpointer.wait()

    def restore(
        self, abstract_state: Any, belongs_to: Mapping[str, Any] | None = None, step: int | None = None
    ) -> tuple[Any, dict[str, Any], int]:
        """(state, meta, step) of a checkpoint, by default the newest, in the shardings and dtypes of `abstract_state`.

        These need not be those that it was saved from: another mesh or number of devices reads its own parts, another
        dtype is cast to. `belongs_to` is what `describe` says of this run.

        Raises ValueError where it is damaged or belongs to another model or tokenizer.
        """
        meta, step = self._meta(belongs_to or {}, step)
        stored = self._read(step, lambda: self._stored(step, abstract_state))
        with _context(stored):
            state = self._read(step, lambda: self._checkpointer.load_checkpointables(step, {"state": stored}))["state"]
        if not _matches(meta, checksums(state)):
            raise ValueError(self._unreadable(step, "its content does not match its checksum"))
        return jax.tree.map(_as_dtype, state, abstract_state), meta, step

    def open(
        self, belongs_to: Mapping[str, Any], step: int | None = None
    ) -> tuple[StoredArrays | None, dict[str, Any], int]:
        """(arrays, meta, step) of a checkpoint, by default the newest, of which nothing but the meta is read yet.

        None in place of the arrays where it is one without checksums of its own for each of them: `restore` reads it.
        Raises ValueError as `restore`.
        """
        meta, step = self._meta(belongs_to, step)
        if _CHECKSUMS not in meta:
            return None, meta, step
        found = StoredArrays(
            self._folder / str(step) / "state", json.loads(meta.pop(_CHECKSUMS)), partial(self._unreadable, step)
        )
        return found, meta, step

    def _meta(self, belongs_to: Mapping[str, Any], step: int | None) -> tuple[dict[str, Any], int]:
        newest = self.latest_step()
        assert newest is not None, "no checkpoint yet"
        step = newest if step is None else step
        if all(c.step != step for c in self._checkpointer.checkpoints):
            there = ", ".join(str(c.step) for c in self._checkpointer.checkpoints)
            raise ValueError(f"{self._folder} has no checkpoint of step {step}; there are {there}")
        meta = self._read(step, lambda: self._checkpointer.load_checkpointables(step, {"meta": None}))["meta"]
        difference = _difference(meta, belongs_to)
        if difference:
            raise ValueError(
                f"checkpoint {self._folder / str(step)} is of another {difference}; "
                "choose another out=, or pass --fresh to start again"
            )
        return meta, step

    def _stored(self, step: int, wanted: Any) -> Any:
        """`wanted`, in the types that the arrays are stored in. Raises ValueError for a difference in anything else."""
        there = _by_name(self._checkpointer.checkpointables_metadata(step).metadata["state"])
        here = _by_name(wanted)
        for name in sorted(here.keys() ^ there.keys()):
            raise ValueError(f"{name} is {'missing' if name in here else 'one array too many'}")
        for name, array in here.items():
            if tuple(there[name].shape) != array.shape:
                raise ValueError(f"{name} has shape {tuple(there[name].shape)}; this run's is {array.shape}")
        dtypes = iter([there[name].dtype for name in here])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, next(dtypes), sharding=x.sharding), wanted)

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` gives. Raises ValueError naming the checkpoint where it fails."""
        loaded, reason = None, ""
        with _dropping_coroutines_silently():
            try:
                loaded = read()
            except Exception as error:
                reason = _reason(error)
            if reason:
                _wait_for_readers()
        if reason:
            raise ValueError(self._unreadable(step, reason))
        return loaded

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
    return {} if frozen is None else {"base": {"init_from": init_from, _CHECKSUM: _together(checksums(frozen))}}


def check_base(meta: dict[str, Any], init_from: str | None, frozen: Any) -> None:
    """Raises ValueError where an adapter was trained on other frozen parameters than these; None where none are."""
    if frozen is not None:
        check_base_sums(meta, init_from, checksums(frozen))


def check_base_sums(meta: dict[str, Any], init_from: str | None, sums: dict[str, int]) -> None:
    """`check_base` of parameters whose checksums are known."""
    if meta["base"][_CHECKSUM] != _together(sums):
        raise ValueError(
            f"init_from={init_from!r} holds other weights than those the adapter was trained on, which came from "
            f"{meta['base']['init_from']!r}; restore them there, or pass --fresh to start again"
        )


def _check_metric(name: str | None) -> None:
    if name is not None and name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "jorch/metrics.py lists all"
        raise ValueError(f"checkpoint.best_metric={name!r} is no metric; {hint}")


def _preservation(config: CheckpointConfig) -> Any:
    policies: Any = ocp.training.preservation_policies
    latest = policies.LatestN(config.keep)
    name = config.best_metric
    if name is None:
        return latest
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[name],
        reverse=config.best_is == "lowest",
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return policies.AnyPreservationPolicy([latest, best])


def _ranked(metrics: Mapping[str, float] | None, name: str | None) -> dict[str, float] | None:
    """What Orbax is to rank a checkpoint by; what was not measured, or is no number, cannot be the best."""
    if metrics is None or name is None or not math.isfinite(metrics.get(name, math.nan)):
        return None
    return {name: metrics[name]}


def _context(state: Any, ocdbt: bool = True) -> ocp.Context:
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = ocdbt
    context.array_options.saving.scoped_storage_options_creator = parts
    # Orbax refuses an array that is larger than the whole limit.
    largest = max((math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)), default=0)
    limit = max(_CONCURRENT_BYTES, 2 * largest)
    context.memory_options.write_concurrent_bytes = limit
    context.memory_options.read_concurrent_bytes = limit
    return context


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How a checkpoint's model or tokenizer differs from this run's; empty where neither does."""
    ours, theirs = here.get("model", {}), there.get("model", {})
    keys = [key for key in ours if ours[key] != theirs.get(key)]
    if keys:
        return "model: " + ", ".join(f"{key}={theirs.get(key)} there, {ours[key]} here" for key in keys)
    digest = "tokenizer_digest"
    if digest in here and here[digest] != there.get(digest):
        return f"tokenizer: sha256 {str(there.get(digest))[:12]}... there, {here[digest][:12]}... here"
    return ""


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by names such as params/layers/q, whether they lie in tuples or in what Orbax makes of these."""
    return {"/".join(names_of(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _as_dtype(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    return x if x.dtype == wanted.dtype else _cast(x, wanted.dtype)


@partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


def _matches(meta: dict[str, Any], found: dict[str, int]) -> bool:
    """Whether a state has the checksums that its meta loses here."""
    whole, each = meta.pop(_CHECKSUM, None), meta.pop(_CHECKSUMS, None)
    return whole == _together(found) if each is None else json.loads(each) == found


def _together(sums: dict[str, int]) -> int:
    # Odd factors tell the arrays apart and lose no bit.
    return sum((2 * number + 1) * found for number, found in enumerate(sums.values(), 1)) % 2**32


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

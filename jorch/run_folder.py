"""The run folder: who may write to it, what it holds, and how a file in it is replaced.

A stage opens its folder before it does anything else and keeps it open until it ends:

    with open_run_folder(config, resume=resume, fresh=fresh) as folder:
        ...

Every refusal is one `ValueError` line; every failed write is an `OSError` that names its path. Needs no jax.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jorch import config_io
from jorch.sections import COMPUTATION

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = "run.lock"
WRITTEN_BY_RUNS = (
    CONFIG,
    METRICS,
    "checkpoints",
    "tensorboard",
    "trajectories.jsonl",
    "architecture",
    "summary.json",
    "report.html",
    "model",
    "tasks",
    "base",
    "rl",
    "tools_server.yaml",
    "tools_server.log",
    "processes",
    "vllm.log",
    "weights",
)
"""What `--fresh` removes; a file of any other name in the folder is somebody else's."""

_RESULTS = ("summary.json", "tasks", "base", "model")
_MAY_CHANGE = frozenset({"out", "url", "mesh", "checkpoint", "watch", "peak_flops", *COMPUTATION})
"""Keys and sections: where things are, how the same mathematics is computed, what is kept of it and told."""
_SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def open_run_folder(config: BaseModel, *, resume: bool, fresh: bool) -> Iterator[Path]:
    """The folder `config.out`, created, locked against other processes, with the resolved config in it.

    `resume` continues the run that it holds, if any; `fresh` removes that run first. Raises ValueError where
    the folder holds a run and neither is set, a run of another config, or is in use; OSError where it cannot
    be written.
    """
    assert not (resume and fresh)
    folder = Path(getattr(config, "out"))  # noqa: B009 (every stage's config has it)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if fresh:
            _remove_run(folder)
        elif has_run(folder):
            _check_same_config(folder, config)
            if not resume:
                raise ValueError(
                    f"{folder} already holds a run, at step {last_step(folder)}: "
                    "pass --resume to go on, --fresh to start again, or another out="
                )
        atomic_write(folder / CONFIG, config_io.dump(config))
        yield folder


def has_run(folder: Path) -> bool:
    """Whether a run got as far as writing something to go on from; a config alone is not."""
    checkpoints = folder / "checkpoints"
    return (
        bool(read_jsonl(folder / METRICS))
        or any((folder / name).exists() for name in _RESULTS)
        or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    )


def last_step(folder: Path) -> int:
    """The last step in the metrics, 0 before the first."""
    lines = read_jsonl(folder / METRICS)
    return int(lines[-1]["step"]) if lines else 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that a killed process may have left with half a line at its end."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def atomic_write(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`: a reader, or a crash, sees the old content or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a failed system call inside into an OSError about `path`: a failed `write` names none by itself."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _system_error(error: Exception) -> int | None:
    """The errno behind `error`. Native libraries raise exceptions of their own, told by the system's words."""
    if isinstance(error, OSError):
        return error.errno
    return next((number for number in _SYSTEM_ERRORS if os.strerror(number) in str(error)), None)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder by a POSIX lock: the kernel drops it when we die, and our forks do not inherit it."""
    path = folder / LOCK
    with naming(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}: wait for it, or choose another out=") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _remove_run(folder: Path) -> None:
    if not (folder / CONFIG).exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files but no {CONFIG}, so no run: choose another out=")
    for name in WRITTEN_BY_RUNS:
        path = folder / name
        with naming(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _check_same_config(folder: Path, config: BaseModel) -> None:
    """Refuse another config's run. What may differ: addresses, mesh, dtypes, alarms, which checkpoints are kept."""
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds a run without its {CONFIG}: choose another out=")
    there = _flat(_config_there(folder, type(config)))
    here = _flat(json.loads(json.dumps(config.model_dump())))
    differing = [k for k in here | there if here.get(k) != there.get(k) and not _MAY_CHANGE & {*k.split(".")}]
    if differing:
        shown = ", ".join(f"{k}={there.get(k)} there, {here.get(k)} here" for k in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{folder} holds a run of another config ({shown}{more}): pass --fresh to remove it, or choose another out="
        )


def _config_there(folder: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The folder's config, with today's defaults for keys that it lacks; as it is, where `model` refuses it."""
    try:
        return json.loads(json.dumps(config_io.load(folder / CONFIG, model).model_dump()))
    except ValueError:
        return config_io.read_mapping(folder / CONFIG)


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

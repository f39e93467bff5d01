"""The arrays of an Orbax checkpoint in parts: a range of rows at a time, where Orbax itself loads whole arrays.

An array is checked against its checksum when it has been read from end to end for the first time. So a reader that
takes all of them in order knows at its end that none was damaged, and has held none.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

ROWS_BYTES = 64 * 2**20
"""Of an embedding, which is stored in blocks of rows of at most this size."""


def parts(key: tuple[Any, ...], value: Any) -> Any:
    """How Orbax is to divide one array of a train state on disk: a layer, or some rows, can be read alone.

    A stack of layers lies there by layers. Optimizer states are read whole only, and stay as the devices hold them.
    """
    names = names_of(key)
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    if names[0] != "params" or not value.shape:
        return None
    return options(shard_axes=(0,)) if "layers" in names else options(chunk_byte_size=ROWS_BYTES)


def names_of(path: tuple[Any, ...]) -> list[str]:
    """A leaf's path through dictionaries, tuples, and what Orbax makes of these."""
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]


class StoredArrays:
    """Arrays by names such as params/layers/q."""

    def __init__(self, folder: Path, checksums: Mapping[str, int], unreadable: Callable[[str], str]) -> None:
        """Of Orbax's `folder`; `unreadable` makes a message of a reason."""
        self._folder, self._checksums, self._unreadable = folder.absolute(), checksums, unreadable
        self._stores: dict[str, Any] = {}
        self._next: dict[str, int] = {}
        self._sums: dict[str, int] = {}

    @contextmanager
    def kept(self, folder: Path) -> Iterator[None]:
        """Within the block a run that goes on may remove the checkpoint: its files have links in `folder` as well.

        Where there can be none (another file system, a folder that is read-only), they are read where they are.
        """
        with ExitStack() as stack:
            with suppress(OSError):
                links = Path(stack.enter_context(TemporaryDirectory(prefix=".export-", dir=folder)), "arrays")
                shutil.copytree(self._folder, links, copy_function=os.link)
                self._folder = links.absolute()
            yield

    def rows(self, name: str, begin: int, end: int, shape: tuple[int, ...]) -> np.ndarray:
        """Rows [begin, end) of an array of this shape, in the type that it is stored in.

        Raises ValueError where they cannot be read, the array has another shape, or these are the last rows and it does
        not match its checksum.
        """
        reason = ""
        try:
            store = self._open(name)
            if store.shape == shape:
                rows = store[begin:end].read().result()
            else:
                reason = f"{name} has shape {store.shape}; this run's is {shape}"
        except Exception as error:  # tensorstore raises whatever it likes for a damaged folder
            reason = " ".join(str(error).split()).split(" [tensorstore_spec")[0][:200]
        if reason:
            raise ValueError(self._unreadable(reason))
        self._check(name, begin, rows, is_last=end == shape[0])
        return rows

    def _open(self, name: str) -> Any:
        if name not in self._stores:
            files = {"driver": "file", "path": f"{self._folder}/"}
            if (self._folder / "manifest.ocdbt").is_file():
                place = {"driver": "ocdbt", "base": files, "path": f"{name.replace('/', '.')}/"}
            else:
                place = {"driver": "file", "path": f"{self._folder / name.replace('/', '.')}/"}
            self._stores[name] = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
        return self._stores[name]

    def _check(self, name: str, begin: int, rows: np.ndarray, *, is_last: bool) -> None:
        if self._next.get(name, 0) != begin:
            return  # read again, or out of order
        bits = rows.view(f"uint{8 * rows.dtype.itemsize}")
        self._sums[name] = (self._sums.get(name, 0) + int(np.sum(bits, dtype=np.uint32))) % 2**32
        self._next[name] = -1 if is_last else begin + len(rows)
        if is_last and self._sums[name] != self._checksums.get(name):
            raise ValueError(self._unreadable(f"{name} does not match its checksum"))


def checksums(state: Any) -> dict[str, int]:
    """Of every array by its name: a wrapping sum over its bits, which one changed element changes in any sharding.

    Tensorstore checks its own records, but not the arrays' bytes.
    """
    names = ["/".join(names_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return dict(zip(names, map(int, jax.device_get(_sums(jax.tree.leaves(state)))), strict=True))


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    bits = [jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")) for x in arrays]
    return [jnp.sum(x, dtype=jnp.uint32) for x in bits]

"""What a run was made with: versions of the interpreter and of the packages that shape its numbers."""

import platform
from importlib.metadata import version

_PACKAGES = ("jorch", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Name -> version, and the machine's kind."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}

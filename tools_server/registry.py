"""Environment kinds by name. A kind's module may be heavy or optional: imported at its first session."""

import importlib

from tools_server.environment import Environment

ENVIRONMENTS: dict[str, str] = {
    "experts": "tools_server.envs.experts:ExpertsEnvironment",
    "tau2": "tools_server.envs.tau2:Tau2Environment",
    "toolscale": "tools_server.envs.toolscale:ToolScaleEnvironment",
}
"""Dotted path by kind. A class takes (setup, seed, config: ServerConfig)."""
TOOLS = "tools"
"""The kind whose sessions use the server's configured tools (`tool_session.py`)."""

_imported: dict[str, type[Environment]] = {}


def imported(kind: str) -> type[Environment] | None:
    """The class of `kind` if it is imported already."""
    return _imported.get(kind)


def environment_class(kind: str) -> type[Environment]:
    """The class of `kind`, imported at need. Raises ValueError where it is unknown or cannot be imported."""
    if kind not in _imported:
        if kind not in ENVIRONMENTS:
            raise ValueError(f"unknown environment {kind!r}; allowed: {', '.join([*ENVIRONMENTS, TOOLS])}")
        module, name = ENVIRONMENTS[kind].split(":")
        try:
            _imported[kind] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ValueError(f"environment {kind!r} needs a package that is missing: {error}") from error
    return _imported[kind]

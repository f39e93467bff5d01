"""Control groups: limits on all processes of a sandbox together, where the machine lets this process make groups.

Limits of `setrlimit` hold for each process, so that a program of many processes may use many times its memory. A group
holds for their sum, files in the sandbox's `/tmp` included. Version 1 (a folder a controller) and version 2 (one tree).
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "jorch-sandbox-"
CONTROLLERS = ("memory", "pids")


class NoCgroups(ValueError):
    """No group can be made here; the text says why."""


@dataclass(frozen=True, slots=True)
class Cgroups:
    """Where groups are made: one folder, or with version 1 one for each controller."""

    version: int
    parents: dict[str, Path]
    """By controller."""

    @classmethod
    def find(cls, root: Path = ROOT, own: str = "") -> "Cgroups":
        """Below this process's own groups. `own`: the text of /proc/self/cgroup. Raises NoCgroups."""
        own = own or Path("/proc/self/cgroup").read_text(encoding="ascii")
        paths = dict(_controller_and_path(line) for line in own.splitlines())
        if (root / "cgroup.controllers").is_file():
            found = cls(2, dict.fromkeys(CONTROLLERS, _prepare_version_2(_existing(root, paths.get("", "/")))))
        elif all((root / name / "cgroup.procs").is_file() for name in CONTROLLERS):
            found = cls(1, {name: _existing(root / name, paths.get(name, "/")) for name in CONTROLLERS})
        else:
            raise NoCgroups(f"{root} has no controllers for memory and processes")
        found._remove_leftovers()
        found.make("probe", 2**30, 8).remove()
        return found

    def make(self, name: str, memory_bytes: int, max_processes: int) -> "Cgroup":
        """A group of that name with its limits. Raises NoCgroups."""
        folders = {parent / f"{PREFIX}{os.getpid()}-{name}" for parent in self.parents.values()}
        group = Cgroup(self.version, tuple(sorted(folders)))
        memory = {1: {"memory.limit_in_bytes": memory_bytes}, 2: {"memory.max": memory_bytes, "memory.swap.max": 0}}
        try:
            for folder in group.folders:
                folder.mkdir(exist_ok=True)
            for file, limit in (memory[self.version] | {"pids.max": max_processes}).items():
                group.write(file, limit)
        except OSError as error:
            group.remove()
            raise NoCgroups(f"{error.filename}: {error.strerror}") from None
        return group

    def _remove_leftovers(self) -> None:
        """Groups of a server that was killed; the process id in their names says whose they are."""
        for parent in set(self.parents.values()):
            for folder in parent.glob(f"{PREFIX}*"):
                if not Path("/proc", folder.name.removeprefix(PREFIX).partition("-")[0]).exists():
                    with contextlib.suppress(OSError):
                        folder.rmdir()


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One sandbox's group."""

    version: int
    folders: tuple[Path, ...]

    def write(self, file: str, value: int) -> None:
        """Into every folder that has `file`; swap accounting may be absent. Raises OSError."""
        for folder in self.folders:
            if (folder / file).exists():
                (folder / file).write_text(str(value), encoding="ascii")

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel ended a process of the group for want of memory."""
        file = "memory.oom_control" if self.version == 1 else "memory.events"
        for folder in self.folders:
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (folder / file).read_text(encoding="ascii").splitlines())
                return int(counts.get("oom_kill", 0)) > 0
        return False

    def remove(self) -> bool:
        """Whether it is gone. Where a process is left, as one that is only just dying, it is not."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return not any(folder.exists() for folder in self.folders)


def _controller_and_path(line: str) -> tuple[str, str]:
    """Of a line such as "4:memory:/a/b"; version 2 names no controller."""
    _, controllers, path = line.split(":", 2)
    return controllers, path


def _existing(root: Path, path: str) -> Path:
    """The process's own group, or the topmost one that is mounted here: a container may see another tree."""
    own = root / path.lstrip("/")
    return own if own.is_dir() else root


def _prepare_version_2(parent: Path) -> Path:
    """Let groups below `parent` have the controllers.

    A group that has such groups holds no process itself, so this one moves into a group of its own.
    """
    try:
        missing = set(CONTROLLERS) - set((parent / "cgroup.controllers").read_text(encoding="ascii").split())
        if missing:
            raise NoCgroups(f"{parent} may not limit {', '.join(sorted(missing))}")
        control = parent / "cgroup.subtree_control"
        if not set(CONTROLLERS) <= set(control.read_text(encoding="ascii").split()):
            leaf = parent / "jorch-server"
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
            control.write_text(" ".join(f"+{name}" for name in CONTROLLERS), encoding="ascii")
    except OSError as error:
        raise NoCgroups(f"{error.filename}: {error.strerror}") from None
    return parent

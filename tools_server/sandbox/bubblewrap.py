"""One sandboxed process: its command line, its start, one program's run in it, its end.

Started as root, a sandbox first drops to a user id of its own. Otherwise the files of `/proc/sys` that belong
to root would stay writable inside, and the limit on processes would not hold.

A shell joins the cgroup and `setpriv` changes the user, in the new process: so nothing ever runs outside its group, and
Python need not copy this process to start one (fork), which takes the longer the more memory it has, but can use vfork.
"""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tools_server.errors import log
from tools_server.sandbox.cgroup import Cgroup
from tools_server.sandbox.seccomp import filter_program

WORKER = Path(__file__).with_name("worker.py").read_text(encoding="utf-8")
BWRAP = "bwrap"
SETPRIV = "setpriv"
"""Of util-linux."""
PATH = "/usr/bin:/bin"
READY = b"ready\n"
START_TIMEOUT_S = 20.0


class SandboxFailure(RuntimeError):
    """The sandbox, not the program in it, failed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program's run."""

    memory_bytes: int
    """Address space of each process; a file system in memory of a quarter of it comes on top. With cgroups, this and
    that quarter also are what all processes may use together."""
    cpu_s: int
    """Of each process."""
    max_processes: int
    file_bytes: int
    """Of each file."""
    output_bytes: int
    """Of stdout and of stderr."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a program ended. `exit_status` is 128 + N where signal N killed it."""

    exit_status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    cut: bool
    """It was ended because it wrote too much."""
    work_s: float
    out_of_memory: bool = False
    """A process of it was ended because all of them together used too much memory (needs cgroups)."""


def command(python: str, read_only: tuple[str, ...], tmp_bytes: int, seccomp_fd: int) -> list[str]:
    """bwrap's arguments up to the program that it starts."""
    inside = ["/usr", *read_only]
    return [
        *(BWRAP, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL"),
        *(part for path in inside for part in ("--ro-bind", path, path)),
        *(part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")),
        *("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"),
        *("--size", str(tmp_bytes), "--tmpfs", "/tmp", "--size", "1048576", "--tmpfs", "/dev/shm"),
        *("--chdir", "/tmp", "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"),
        *("--setenv", "LANG", "C.UTF-8", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--seccomp", str(seccomp_fd), "--", python),
    ]


def launcher(uid: int | None, cgroup: Cgroup | None) -> list[str]:
    """What comes before bwrap: join the group, become the user. Raises SandboxFailure where a program is missing."""
    for program in (BWRAP, *(() if uid is None else (SETPRIV,))):
        if shutil.which(program, path=PATH) is None:
            raise SandboxFailure(f"{program} is not installed")
    user = [] if uid is None else [SETPRIV, "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--"]
    if cgroup is None:
        return user
    joins = [f"echo $$ >{shlex.quote(str(folder / 'cgroup.procs'))}" for folder in cgroup.folders]
    return ["/bin/sh", "-c", " && ".join([*joins, 'exec "$@"']), "sandbox", *user]


class Sandbox:
    """A process that waits for its one program."""

    def __init__(self, process: asyncio.subprocess.Process, slot: int, limits: Limits, cgroup: Cgroup | None) -> None:
        self.slot = slot
        self._cgroup = cgroup
        self._process = process
        self._limits = limits

    @classmethod
    async def start(
        cls,
        python: str,
        read_only: tuple[str, ...],
        limits: Limits,
        slot: int,
        uid: int | None,
        cgroup: Cgroup | None = None,
    ) -> "Sandbox":
        """A ready sandbox. `uid`: the user to become first, None to stay who we are. `cgroup`: what it joins before,
        and what goes with it. Raises SandboxFailure.
        """
        reading, writing = os.pipe()
        try:
            os.write(writing, filter_program())
            os.close(writing)
            arguments = launcher(uid, cgroup) + command(python, read_only, limits.memory_bytes // 4, reading)
            return await cls._start(arguments, limits, slot, cgroup, (reading,))
        finally:
            os.close(reading)

    @classmethod
    async def start_unprotected(cls, python: str, limits: Limits, slot: int) -> "Sandbox":
        """The same with nothing but resource limits: the program can read and change whatever this process can."""
        return await cls._start([python], limits, slot, None, ())

    @classmethod
    async def _start(
        cls, arguments: list[str], limits: Limits, slot: int, cgroup: Cgroup | None, fds: tuple[int, ...]
    ) -> "Sandbox":
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *(*arguments, "-I", "-c", WORKER, *_resource_limits(limits)),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                pass_fds=fds,
                cwd="/",
                start_new_session=True,
                env={"PATH": PATH},
            )
        except OSError as error:
            raise SandboxFailure(f"{arguments[0]} cannot be started: {error.strerror}") from None
        sandbox = cls(process, slot, limits, cgroup)
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
            if line != READY:
                text = (await asyncio.wait_for(process.stderr.read(2000), START_TIMEOUT_S)).decode(errors="replace")
                reason = " ".join(text.split())[:300] or f"it printed {line!r}"
                raise SandboxFailure(f"a sandbox did not start: {reason}")
        except TimeoutError:
            await sandbox.close()
            raise SandboxFailure(f"a sandbox was not ready within {START_TIMEOUT_S:g} s") from None
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def run(self, source: str, timeout_s: float) -> Run:
        """Execute `source`. The sandbox is spent afterwards. Raises SandboxFailure where something else killed it."""
        process = self._process
        assert process.stdin is not None
        began_s = time.monotonic()
        timed_out = out_of_memory = False
        reading = asyncio.gather(self._read(process.stdout), self._read(process.stderr))
        try:
            async with asyncio.timeout(timeout_s):
                with contextlib.suppress(ConnectionError):  # it died: its exit status will say how
                    process.stdin.write(source.encode("utf-8", "replace"))
                    await process.stdin.drain()
                    process.stdin.close()
                await asyncio.shield(reading)
                await process.wait()
        except TimeoutError:
            timed_out = True
        finally:
            work_s = time.monotonic() - began_s
            out_of_memory = self._cgroup is not None and self._cgroup.ran_out_of_memory()
            await self.close()
        (stdout, stdout_cut), (stderr, stderr_cut) = await reading
        status, cut = process.returncode or 0, stdout_cut or stderr_cut
        if status < 0 and not (timed_out or cut):
            raise SandboxFailure(f"a sandbox was killed from outside (signal {-status})")
        return Run(status if status >= 0 else 128 - status, stdout, stderr, timed_out, cut, work_s, out_of_memory)

    async def close(self) -> None:
        """End it and all that runs in it: its processes die with the first one of their namespace.

        One that was killed while it started may leave a process that does not know yet that it is to die with it: its
        stdin ends, and so does it.
        """
        self._kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        if self._cgroup is not None:
            await self._leave(self._cgroup)

    async def _leave(self, cgroup: Cgroup) -> None:
        """The processes of the namespace die a moment after the one that was waited for."""
        for _ in range(200):
            if cgroup.remove():
                return
            await asyncio.sleep(0.005)
        log.warning("cgroup %s still holds a process; the next start removes it", cgroup.folders[0])

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, stream: asyncio.StreamReader | None) -> tuple[bytes, bool]:
        """Everything, or the first `output_bytes` and True; then the writer is ended, however much it has left.

        What is left in the pipe is read all the same: asyncio takes a process for ended when its pipes are.
        """
        assert stream is not None
        content = bytearray()
        most, cut = self._limits.output_bytes, False
        while chunk := await stream.read(65536):
            content += chunk[: most - len(content) + 1]
            if len(content) > most and not cut:
                cut = True
                self._kill()
        return bytes(content[:most]), cut


def _resource_limits(limits: Limits) -> list[str]:
    """NAME=SOFT:HARD. The soft limit on CPU time sends SIGXCPU, which tells it from other ends."""
    limit = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_NPROC": limits.max_processes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    cpu = f"RLIMIT_CPU={limits.cpu_s}:{limits.cpu_s + 1}"
    return [*(f"{name}={value}:{value}" for name, value in limit.items()), cpu]

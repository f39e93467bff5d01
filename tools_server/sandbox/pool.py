"""A fixed number of sandboxes, started before they are needed; each serves one call."""

import asyncio
import os
import time
from typing import Literal

from tools_server.errors import log
from tools_server.sandbox.bubblewrap import Limits, Run, Sandbox, SandboxFailure
from tools_server.sandbox.cgroup import Cgroup, Cgroups, NoCgroups

FIRST_UID = 61_000
"""Slot n of a pool runs as this user id + n; the range belongs to no distribution's users."""
OWN_PROCESSES = 2
"""bwrap's, outside and inside."""
PAUSE_S = 0.5
"""After a failed start, before the next one."""


class SandboxPool:
    """`size` sandboxes; as many programs run at once. An async context manager.

    Entering it raises ValueError where no sandbox can be started here, with the reason.
    """

    def __init__(
        self,
        size: int,
        limits: Limits,
        python: str,
        read_only: tuple[str, ...] = (),
        *,
        unprotected: bool = False,
        cgroups: Literal["auto", "require", "off"] = "auto",
    ) -> None:
        self._size = size
        self._limits = limits
        self._python = python
        self._read_only = read_only
        self._unprotected = unprotected
        self._wanted_cgroups = cgroups
        self._cgroups: Cgroups | None = None
        self._num_started = 0
        self._waiting: asyncio.Queue[Sandbox | SandboxFailure] = asyncio.Queue()
        self._starting: set[asyncio.Task[None]] = set()
        self._closing = False

    async def __aenter__(self) -> "SandboxPool":
        if self._wanted_cgroups != "off" and not self._unprotected:
            self._cgroups = self._find_cgroups()
        try:
            self._waiting.put_nowait(await self._start(0))
        except SandboxFailure as failure:
            raise ValueError(
                f"{failure}; install bubblewrap 0.8 or later on a kernel that allows user namespaces, or set "
                "run_model_code_without_a_sandbox: true if this machine holds nothing that a program may not touch"
            ) from None
        for slot in range(1, self._size):
            self._prepare(slot)
        return self

    def _find_cgroups(self) -> Cgroups | None:
        try:
            return Cgroups.find()
        except NoCgroups as reason:
            if self._wanted_cgroups == "require":
                raise ValueError(f"no cgroup can be made ({reason}); set cgroups: auto to go without") from None
            log.warning("sandboxes run without cgroups (%s): memory is limited for each process, not in total", reason)
            return None

    async def __aexit__(self, *_: object) -> None:
        """Starts under way are waited for: asyncio may hang where the start of a process is cancelled."""
        self._closing = True
        await asyncio.gather(*self._starting)
        while not self._waiting.empty():
            sandbox = self._waiting.get_nowait()
            if isinstance(sandbox, Sandbox):
                await sandbox.close()

    async def run(self, source: str, timeout_s: float) -> tuple[Run, float]:
        """The program's run, and the seconds that it waited for a sandbox. Raises SandboxFailure."""
        began_s = time.monotonic()
        while True:
            sandbox = await self._waiting.get()
            if isinstance(sandbox, SandboxFailure):
                raise sandbox
            if sandbox.alive:
                break
            await sandbox.close()  # it died in its sleep
            self._prepare(sandbox.slot)
        wait_s = time.monotonic() - began_s
        try:
            return await sandbox.run(source, timeout_s), wait_s
        finally:
            self._prepare(sandbox.slot)

    def _prepare(self, slot: int) -> None:
        task = asyncio.create_task(self._put_one(slot))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _put_one(self, slot: int) -> None:
        """Put a fresh sandbox where a run finds it. A failure ends one run where one waits, then is mended."""
        while not self._closing:
            try:
                self._waiting.put_nowait(await self._start(slot))
                return
            except SandboxFailure as failure:
                if self._waiting.empty():
                    self._waiting.put_nowait(failure)
                await asyncio.sleep(PAUSE_S)

    async def _start(self, slot: int) -> Sandbox:
        if self._unprotected:
            return await Sandbox.start_unprotected(self._python, self._limits, slot)
        uid = FIRST_UID + slot if os.geteuid() == 0 else None
        cgroup = self._make_cgroup(self._cgroups) if self._cgroups is not None else None
        try:
            return await Sandbox.start(self._python, self._read_only, self._limits, slot, uid, cgroup)
        except BaseException:
            if cgroup is not None:
                cgroup.remove()
            raise

    def _make_cgroup(self, cgroups: Cgroups) -> Cgroup:
        """For the sandbox's own processes too, which wait beside the program's."""
        self._num_started += 1
        memory_bytes = self._limits.memory_bytes + self._limits.memory_bytes // 4
        name = f"{id(self):x}-{self._num_started}"
        try:
            return cgroups.make(name, memory_bytes, self._limits.max_processes + OWN_PROCESSES)
        except NoCgroups as reason:
            raise SandboxFailure(f"no cgroup can be made: {reason}") from None

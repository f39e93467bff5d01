"""Limits on all processes of a program together (cgroups), and sandboxes of another server over real HTTP."""

import asyncio
import logging
import os
import shutil
import subprocess

import pytest
from server_client import serving

from tools_server.config import PythonConfig
from tools_server.sandbox import pool
from tools_server.sandbox.bubblewrap import Limits
from tools_server.sandbox.cgroup import PREFIX, Cgroups, NoCgroups
from tools_server.sandbox.pool import SandboxPool
from tools_server.tool import CallContext
from tools_server.tools.python import PythonTool, describe

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap (Debian package bubblewrap)")
MEBI = 1024**2
LIMITS = Limits(memory_bytes=128 * MEBI, cpu_s=10, max_processes=16, file_bytes=64 * MEBI, output_bytes=10_000)
FAMILY = """
import os, sys, time
for number in range(4):
    if os.fork() == 0:
        held = bytearray(70 << 20)
        time.sleep(1.5)
        os._exit(0)
statuses = [os.wait()[1] for _ in range(4)]
sys.exit(9 if any(os.WIFSIGNALED(status) for status in statuses) else 0)
"""
"""Each process is within its own limit; together they use 280 MiB."""


@pytest.fixture(scope="module")
def cgroups():
    try:
        return Cgroups.find()
    except NoCgroups as reason:
        pytest.skip(f"needs cgroups that this process may make: {reason}")


def run(source, limits=LIMITS, **options):
    async def main():
        async with SandboxPool(1, limits, "/usr/bin/python3", **options) as sandboxes:
            return (await sandboxes.run(source, 20.0))[0]

    return asyncio.run(main())


def groups_left(cgroups):
    pattern = f"{PREFIX}{os.getpid()}-*"
    return [path for parent in cgroups.parents.values() for path in parent.glob(pattern)]


def test_memory_of_all_processes_together(cgroups):
    result = run(FAMILY, cgroups="require")
    assert (result.exit_status, result.out_of_memory) == (9, True)
    assert describe(result, 20.0) == ("error: ended because it used too much memory", "tool_error")
    assert groups_left(cgroups) == []


def test_the_same_program_lives_without_a_group():
    """So that it is the group that ended it; with less sleep, to spare the clock."""
    result = run(FAMILY.replace("sleep(1.5)", "sleep(0.5)"), cgroups="off")
    assert (result.exit_status, result.out_of_memory) == (0, False)


def test_files_in_memory_count(cgroups):
    """One process, each of its files within the limit: 30 MiB of files and 110 MiB of memory with a total of 120."""
    limits = Limits(memory_bytes=96 * MEBI, cpu_s=10, max_processes=16, file_bytes=64 * MEBI, output_bytes=10_000)
    program = "open('/tmp/a', 'wb').write(bytes(20 << 20))\nimport os\n" + FAMILY.replace("70 << 20", "30 << 20")
    assert run(program, limits, cgroups="require").out_of_memory
    assert groups_left(cgroups) == []


def test_the_group_holds_the_sandbox_and_its_limits(cgroups):
    async def main():
        async with SandboxPool(1, LIMITS, "/usr/bin/python3", cgroups="require"):
            found = {}
            for folder in groups_left(cgroups):
                for name in ("pids.max", "memory.limit_in_bytes", "memory.max"):
                    if (folder / name).exists():
                        found[name] = int((folder / name).read_text())
                pids = (folder / "cgroup.procs").read_text().split()
                assert len(pids) >= 2
                shown = subprocess.run(["ps", "-o", "comm=", "-p", ",".join(pids)], capture_output=True, text=True)
                assert "python3" in shown.stdout.split()
            return found

    found = asyncio.run(main())
    assert found.pop("pids.max") == 16 + pool.OWN_PROCESSES
    assert list(found.values()) == [160 * MEBI]
    assert groups_left(cgroups) == []


def test_groups_of_dead_servers_go_and_those_of_living_ones_stay(cgroups):
    dead = subprocess.Popen(["true"])
    dead.wait()
    parent = next(iter(cgroups.parents.values()))
    left, used = parent / f"{PREFIX}{dead.pid}-x", parent / f"{PREFIX}{os.getppid()}-x"
    left.mkdir()
    used.mkdir()
    try:
        Cgroups.find()
        assert not left.exists()
        assert used.exists()
    finally:
        used.rmdir()


def test_a_machine_without_cgroups(tmp_path, monkeypatch, caplog):
    def find():
        return find_below(tmp_path)

    find_below = Cgroups.find
    monkeypatch.setattr(Cgroups, "find", find)
    reason = f"{tmp_path} has no controllers for memory and processes"
    with pytest.raises(ValueError) as caught:
        run("print(1)", cgroups="require")
    assert str(caught.value) == f"no cgroup can be made ({reason}); set cgroups: auto to go without"
    with caplog.at_level(logging.WARNING):
        assert run("print(1)").stdout == b"1\n"
    assert caplog.messages == [
        f"sandboxes run without cgroups ({reason}): memory is limited for each process, not in total"
    ]


def version_2(tmp_path, controllers, enabled=""):
    """The files of a version 2 tree in which the server's own group is /service."""
    service = tmp_path / "service"
    service.mkdir()
    (tmp_path / "cgroup.controllers").write_text(controllers)
    (service / "cgroup.controllers").write_text(controllers)
    (service / "cgroup.subtree_control").write_text(enabled)
    return service


def test_version_2_frees_the_own_group_first(tmp_path):
    service = version_2(tmp_path, "cpu memory pids")
    found = Cgroups.find(tmp_path, "0::/service\n")
    assert (found.version, set(found.parents.values())) == (2, {service})
    assert (service / "jorch-server" / "cgroup.procs").read_text() == str(os.getpid())
    assert (service / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_version_2_that_is_ready_is_left_alone(tmp_path):
    service = version_2(tmp_path, "cpu memory pids", enabled="memory pids")
    Cgroups.find(tmp_path, "0::/service\n")
    assert sorted(path.name for path in service.iterdir()) == ["cgroup.controllers", "cgroup.subtree_control"]


def test_version_2_without_a_controller(tmp_path):
    service = version_2(tmp_path, "cpu pids")
    with pytest.raises(NoCgroups, match=f"{service} may not limit memory"):
        Cgroups.find(tmp_path, "0::/service\n")


HOST = {"python": {"kind": "python", "sandboxes": 2, "timeout_s": 1, "max_processes": 16}}


def remote(url, **options):
    return {"python": {"kind": "remote_python", "url": url, "retries": 0, "usd_per_second": 1.0} | options}


def test_programs_run_on_another_server():
    async def main():
        async with serving(HOST) as host, serving(remote(host.url)) as server:
            verifier = {"kind": "tests", "tests": "assert double(2) == 4"}
            await server.open(verifier=verifier)
            fine, wrong, late = await server.calls(
                ("0", "python", {"code": "print('é' * 3)"}),
                ("1", "python", {"code": "import sys\nprint(1)\nsys.exit(3)"}),
                ("2", "python", {"code": "while True: pass"}),
            )
            assert (fine["content"], fine["error"]) == ("ééé", None)
            assert fine["cost_usd"] == pytest.approx(fine["work_s"])
            assert (wrong["content"], wrong["error"]) == ("1\nerror: ended with status 3", "tool_error")
            assert (late["content"], late["error"]) == ("error: ended after 20 s", "timeout")
            assert 1 <= late["work_s"] < 4  # the other tool's limit holds
            await server.call("3", "", content="def double(x):\n    return 2 * x")
            record = await server.finish()
            assert (record["outcome"], record["verdict"]["verifier"]) == (1.0, "tests/1")

    asyncio.run(main())


def test_load_does_not_change_what_a_program_costs():
    """The declared latency is billed as seconds too, so that equal calls of siblings are equally dear."""

    async def main():
        async with serving({"python": HOST["python"] | {"usd_per_second": 2, "latency_s": 1.5}}) as server:
            await server.open()
            quick, slow = await server.calls(
                ("0", "python", {"code": "print(1)"}), ("1", "python", {"code": "import time\ntime.sleep(0.3)"})
            )
            assert slow["work_s"] > quick["work_s"]
            assert [(call["cost_usd"], call["latency_s"]) for call in (quick, slow)] == [(3.0, 1.5)] * 2

    asyncio.run(main())


def test_another_server_that_fails_is_no_fault_of_the_program(monkeypatch):
    async def main():
        async with serving(HOST | {"other": {"kind": "constant", "answer": "x"}}) as host:
            async with serving(remote(host.url, tool="other")) as server:
                await server.open()
                result = await server.call("0", "python", code="print(1)")
                assert result["error"] == "infra_error"
                assert "tool: got 'other', programs are run by python" in result["content"]
            config = serving(remote(host.url))
        async with config as server:  # the host is gone
            await server.open()
            result = await server.call("0", "python", code="print(1)")
            assert result["error"] == "infra_error"
            assert result["content"].startswith(f"the remote sandbox failed: {host.url} does not answer: ")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("payload", "line"),
    [
        ([], "expected an object, got list"),
        ({"tool": "python", "source": ""}, "expected the fields tool, source, timeout_s; got tool, source"),
        ({"tool": "python", "source": 3, "timeout_s": 1}, "source: expected a string"),
        ({"tool": "python", "source": "", "timeout_s": -1}, "timeout_s: expected a number above 0"),
        ({"tool": ["python"], "source": "", "timeout_s": 1}, "tool: expected a string"),
    ],
)
def test_requests_that_are_none(payload, line):
    async def main():
        async with serving({}) as server, server.http.post(f"{server.url}/v1/programs", json=payload) as response:
            assert response.status == 400
            assert line in (await response.json())["error"]

    asyncio.run(main())


def test_a_remote_sandbox_asks_for_the_other_servers_token(monkeypatch):
    """The key travels as the bearer token; without it the other server answers 401."""

    async def main():
        monkeypatch.setenv("JORCH_TOOLS_TOKEN", "secret")
        async with serving(HOST) as host:
            monkeypatch.delenv("JORCH_TOOLS_TOKEN")
            monkeypatch.setenv("SANDBOX_TOKEN", "secret")
            async with serving(remote(host.url, key_variable="SANDBOX_TOKEN")) as server:
                await server.open()
                assert (await server.call("0", "python", code="print(1)"))["content"] == "1"
            async with serving(remote(host.url)) as server:
                await server.open()
                result = await server.call("0", "python", code="print(1)")
                assert (result["error"], "401" in result["content"]) == ("infra_error", True)

    asyncio.run(main())


def test_check_runs_a_program():
    async def main():
        config = PythonConfig.model_validate({"kind": "python", "sandboxes": 1})
        [tool] = await PythonTool("python", config).start()
        try:
            assert await tool.fault() is None
            return await tool.call({"code": "print(2)"}, CallContext("s", 0))
        finally:
            await tool.close()

    assert asyncio.run(main()).content == "2"

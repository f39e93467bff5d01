"""The sandbox: every way out that is known for such sandboxes, and every resource that a program can exhaust.

A probe of what a program could change looks whether it could; it never does it. What bubblewrap needs is on the machine or
the tests fail: a skip here would be a hole.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import struct
import subprocess
import time

import pytest

from tools_server.config import PythonConfig
from tools_server.sandbox.bubblewrap import Limits, SandboxFailure
from tools_server.sandbox.pool import FIRST_UID, SandboxPool
from tools_server.sandbox.seccomp import filter_program
from tools_server.tool import CallContext, Price
from tools_server.tools.python import PythonTool

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap (Debian package bubblewrap)")

PYTHON = "/usr/bin/python3"
MEBI = 1024**2
LIMITS = Limits(memory_bytes=256 * MEBI, cpu_s=1, max_processes=16, file_bytes=MEBI, output_bytes=10_000)
CONTEXT = CallContext("s", seed=0)


def run(source, timeout_s=20.0, limits=LIMITS):
    """One program in a pool of one."""

    async def main():
        async with SandboxPool(1, limits, PYTHON) as pool:
            return (await pool.run(source, timeout_s))[0]

    return asyncio.run(main())


def printed(source, **options):
    result = run(source, **options)
    assert result.exit_status == 0, result.stderr.decode()
    return result.stdout.decode().split()


# Escapes


def test_no_file_of_proc_sys_is_writable():
    assert printed("""
import os
files = [os.path.join(folder, name) for folder, _, names in os.walk("/proc/sys") for name in names]
print(len(files) > 100, sum(os.access(path, os.W_OK) for path in files))
""") == ["True", "0"]


def test_nothing_of_the_host_is_visible_or_writable():
    names = printed("""
import os
print(*sorted(os.listdir("/")))
print(*[path for path in ("/", "/usr", "/usr/bin", "/bin", "/lib", "/proc", "/dev", "/proc/sys") if os.access(path, os.W_OK)])
print(os.path.exists("/etc/passwd"), os.path.exists("/root"), os.path.exists("/home"), os.path.exists("/sys"))
""")
    assert names == ["bin", "dev", "lib", "lib64", "proc", "tmp", "usr", "False", "False", "False", "False"]


def test_a_hidden_path_is_hidden_from_links_and_open_files():
    assert printed("""
import os
print(os.path.exists("/proc/1/root/etc"), os.path.exists("/proc/self/cwd/../etc"))
print(*sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd") if
              os.path.lexists(f"/proc/self/fd/{fd}")))
""") == ["False", "False", "/dev/null", "pipe", "pipe"]


def test_only_its_own_processes_are_visible():
    own = printed("import os; print(sorted(int(n) for n in os.listdir('/proc') if n.isdigit())[-1], os.getppid())")
    assert int(own[0]) <= 3
    assert own[1] == "1"


def test_it_is_an_unprivileged_user_without_capabilities():
    text = " ".join(
        printed("""
import os
print(os.getuid(), os.getgid(), os.getgroups())
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs", "Seccomp:"))])
""")
    )
    assert text == "65534 65534 [] " + " ".join(["0" * 16] * 5) + " 1 2" or text.startswith("65534 65534 [65534] ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's id to give")
def test_on_the_host_it_is_a_user_of_its_own():
    async def main():
        async with SandboxPool(2, LIMITS, PYTHON) as pool:
            runs = [asyncio.create_task(pool.run("import time; time.sleep(20)", 20)) for _ in range(2)]
            async with asyncio.timeout(15):
                while not {FIRST_UID, FIRST_UID + 1} <= uids():
                    await asyncio.sleep(0.05)
            for running in runs:
                running.cancel()
            await asyncio.gather(*runs, return_exceptions=True)

    def uids():
        listing = subprocess.run(["ps", "-eo", "uid"], capture_output=True, text=True, check=True).stdout.split()
        return {int(uid) for uid in listing[1:]}

    asyncio.run(main())


def test_no_network():
    with contextlib.closing(__import__("socket").create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        result = printed(f"""
import socket
for host in ("127.0.0.1", "192.0.2.1", "2001:db8::1"):
    try:
        socket.create_connection((host, {port}), timeout=2)
        print("connected")
    except OSError as error:
        print(type(error).__name__)
print(*[line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line])
""")
    assert "connected" not in result[:3]
    assert result[3:] == ["lo"]


def test_the_system_call_filter_shuts_vsock_netlink_packets_and_io_uring():
    """Families 40 (vsock), 16 (netlink), 17 (packet), 38 (crypto); AF_UNIX and AF_INET work."""
    assert (
        printed("""
import ctypes, errno, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
for family in (40, 16, 17, 38):
    try:
        socket.socket(family, socket.SOCK_RAW if family in (16, 17) else socket.SOCK_STREAM)
        print("open")
    except PermissionError:
        print("shut")
socket.socketpair()
socket.socket(socket.AF_INET)
numbers = {"x86_64": (425, 321, 298, 323, 250, 101), "aarch64": (425, 280, 241, 282, 219, 117)}[platform.machine()]
for number in numbers:  # io_uring_setup, bpf, perf_event_open, userfaultfd, keyctl, ptrace
    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1
    print(errno.errorcode[ctypes.get_errno()])
""")
        == ["shut"] * 4 + ["EPERM"] * 6
    )


def test_the_filter_jumps_to_its_own_ends():
    """Every path through the program ends at a return, on both architectures."""
    for machine in ("x86_64", "aarch64"):
        program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
        for i, (code, true, false, _) in enumerate(program):
            if code in (0x15, 0x35):
                assert i + 1 + max(true, false) < len(program)
        assert [code for code, *_ in program[-3:]] == [0x06] * 3
    with pytest.raises(ValueError, match="knows x86_64, aarch64, not riscv64"):
        filter_program("riscv64")


def test_no_further_namespace_can_be_made():
    assert (
        printed("""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x00020000, 0x40000000):  # user, mount, network
    print(libc.unshare(flag), errno.errorcode[ctypes.get_errno()])
""")[0::2]
        == ["-1"] * 3
    )


def test_limits_cannot_be_raised():
    result = run("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))")
    assert b"ValueError" in result.stderr or b"PermissionError" in result.stderr


def test_the_environment_holds_no_secret(monkeypatch):
    monkeypatch.setenv("JORCH_TOOLS_TOKEN", "secret")
    assert "secret" not in " ".join(
        printed("""
import os
print(dict(os.environ))
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        print(open(f"/proc/{pid}/environ").read(), open(f"/proc/{pid}/cmdline").read()[:50])
    except OSError:
        pass
""")
    )


# Exhaustion


def test_memory():
    result = run("b = bytearray(10**9)")
    assert result.exit_status == 1
    assert b"MemoryError" in result.stderr


def test_cpu_time_of_a_program_that_ignores_the_signal():
    result = run("import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass")
    assert result.exit_status == 128 + signal.SIGKILL
    assert not result.timed_out


def test_cpu_time():
    assert run("while True: pass").exit_status == 128 + signal.SIGXCPU


def test_wall_time():
    began_s = time.monotonic()
    result = run("import time\nprint('begun', flush=True)\ntime.sleep(60)", timeout_s=1.0)
    assert (result.timed_out, result.stdout) == (True, b"begun\n")
    assert time.monotonic() - began_s < 15


def test_processes():
    result = run("""
import os, time
for number in range(100):
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    print(number, flush=True)
""")
    assert b"BlockingIOError" in result.stderr
    assert len(result.stdout.split()) < LIMITS.max_processes


def test_threads():
    result = run("import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(1,)).start()")
    assert b"can't start new thread" in result.stderr


def test_file_size_and_file_system():
    assert b"File too large" in run("open('/tmp/a', 'wb').write(bytes(2**21))").stderr
    result = run("for i in range(1000): open(f'/tmp/{i}', 'wb').write(bytes(2**19))")
    assert b"No space left on device" in result.stderr


def test_output_of_either_stream():
    for stream in ("stdout", "stderr"):
        result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10_000)")
        assert result.cut
        assert len(getattr(result, stream)) == LIMITS.output_bytes


def test_open_files():
    assert b"Too many open files" in run("keep = [open('/dev/null') for _ in range(1000)]").stderr


def test_daemons_die_with_the_program():
    marker = f"sleeper{os.getpid()}"
    result = run(f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/usr/bin/python3", ["{marker}", "-c", "import time; time.sleep(60)"])
    os._exit(0)
time.sleep(0.3)
print("left")
""")
    assert result.stdout == b"left\n"
    for _ in range(50):
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if marker not in listing:
            break
        time.sleep(0.1)
    assert marker not in listing


# The pool


def test_nothing_is_left_for_the_next_program():
    async def main():
        async with SandboxPool(1, LIMITS, PYTHON) as pool:
            await pool.run("open('/tmp/left', 'w').write('x'); import builtins; builtins.left = 1", 20)
            return (await pool.run("import os, builtins; print(os.listdir('/tmp'), hasattr(builtins, 'left'))", 20))[0]

    assert asyncio.run(main()).stdout == b"[] False\n"


def children():
    listing = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid,comm"], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in listing.splitlines()[1:] if line.split()[1] == "bwrap"]


def test_a_sandbox_killed_while_it_waits_is_replaced():
    async def main():
        async with SandboxPool(1, LIMITS, PYTHON) as pool:
            [pid] = children()
            os.kill(pid, signal.SIGKILL)
            [sandbox] = pool._waiting._queue
            while sandbox.alive:  # until asyncio has heard of it
                await asyncio.sleep(0.01)
            return (await pool.run("print(1)", 20))[0]

    assert asyncio.run(main()).stdout == b"1\n"


def test_a_sandbox_killed_at_work_is_no_fault_of_the_program():
    async def main():
        async with SandboxPool(1, LIMITS, PYTHON) as pool:
            [pid] = children()
            running = asyncio.create_task(pool.run("import time; time.sleep(20)", 20))
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(SandboxFailure, match="killed from outside"):
                await running
            return (await pool.run("print(1)", 20))[0]  # and the pool goes on

    assert asyncio.run(main()).stdout == b"1\n"
    assert children() == []


def test_a_cancelled_run_gives_its_sandbox_back():
    async def main():
        async with SandboxPool(1, LIMITS, PYTHON) as pool:
            running = asyncio.create_task(pool.run("import time; time.sleep(20)", 20))
            await asyncio.sleep(0.2)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return (await pool.run("print(1)", 20))[0]

    assert asyncio.run(main()).stdout == b"1\n"
    assert children() == []


def test_a_pool_that_is_closed_while_its_sandboxes_start():
    """Whatever moment of the start the end meets."""

    async def main():
        for number in range(12):
            async with SandboxPool(4, LIMITS, PYTHON):
                await asyncio.sleep(0.004 * number)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert children() == []


def test_it_does_not_start_without_a_sandbox_unless_told_to(monkeypatch):
    async def start(**options):
        async with SandboxPool(1, LIMITS, PYTHON, **options) as pool:
            return (await pool.run("print(1)", 20))[0]

    monkeypatch.setattr("tools_server.sandbox.bubblewrap.BWRAP", "no-such-bwrap")
    with pytest.raises(ValueError, match=r"no-such-bwrap is not installed; .* run_model_code_without_a_sandbox: true"):
        asyncio.run(start())
    assert asyncio.run(start(unprotected=True)).stdout == b"1\n"


# The tool


def ask(code, context=CONTEXT, **options):
    async def main():
        config = PythonConfig.model_validate(
            {"kind": "python", "sandboxes": 1, "cpu_s": 1, "usd_per_call": 0.25, "usd_per_second": 2, **options}
        )
        [tool] = await PythonTool("python", config).start()
        try:
            output = await tool.call({"code": code}, context)
            return output, tool.spec.price
        finally:
            await tool.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "content", "error"),
    [
        ("print(6 * 7)", "42", None),
        ("x = 1", "(nothing was printed)", None),
        (
            "print('a')\n1 / 0",
            'a\nTraceback (most recent call last):\n  File "<program>", line 2, in <module>\nZeroDivisionError: division by zero',
            "tool_error",
        ),
        ("if", '  File "<program>", line 1\n    if\n      ^\nSyntaxError: invalid syntax', "tool_error"),
        ("import sys; sys.exit(3)", "error: ended with status 3", "tool_error"),
        ("while True: pass", "error: ended because it used too much CPU time", "timeout"),
    ],
)
def test_what_the_orchestrator_reads(code, content, error):
    output, _ = ask(code)
    assert (output.content, output.error) == (content.strip(), error)


NOW_S = 1747305000.25  # 2025-05-15T10:30:00.25Z

STOPPED = """
import datetime, pickle, time
from datetime import date, datetime as moment, timedelta, timezone
began_s = time.perf_counter()
time.sleep(0.01)
assert time.perf_counter() - began_s >= 0.01, "measured times go on"
assert (time.time(), time.time_ns()) == (1747305000.25, 1747305000250000000)
assert time.gmtime()[:6] == time.localtime()[:6] == (2025, 5, 15, 10, 30, 0) and time.gmtime(0).tm_year == 1970
assert time.strftime("%Y-%m-%d") == "2025-05-15" and time.strftime("%Y", time.gmtime(0)) == "1970"
assert time.ctime() == time.asctime() == "Thu May 15 10:30:00 2025"
assert date.today() == date(2025, 5, 15) == moment.now().date() and repr(date.today()) == "datetime.date(2025, 5, 15)"
assert moment.now() == moment.today() == moment.utcnow() == moment(2025, 5, 15, 10, 30, 0, 250000)
assert moment.now(timezone.utc).isoformat() == "2025-05-15T10:30:00.250000+00:00"
assert repr(moment.now()) == "datetime.datetime(2025, 5, 15, 10, 30, 0, 250000)"
assert moment.now() + timedelta(days=20) == moment.fromisoformat("2025-06-04T10:30:00.250")
assert isinstance(moment.now(), date) and isinstance(moment.now().date(), date) and issubclass(moment, date)
assert pickle.loads(pickle.dumps(moment.now())) == moment.now()
class Day(date): pass
assert isinstance(Day.today(), Day) and not isinstance(date.today(), Day)
print(moment.now())
1 / 0
"""


def test_a_session_may_have_a_clock_that_stands_still():
    """Lines of the program keep their numbers."""
    output, _ = ask(STOPPED, CallContext("s", seed=0, clock_s=NOW_S))
    assert output.content.splitlines() == [
        "2025-05-15 10:30:00.250000",
        "Traceback (most recent call last):",
        f'  File "<program>", line {len(STOPPED.splitlines())}, in <module>',
        "ZeroDivisionError: division by zero",
    ]


def test_a_clock_before_1970():
    output, _ = ask(
        "import time; print(time.time(), time.time_ns(), time.gmtime()[:3])", CallContext("s", 0, clock_s=-0.5)
    )
    assert output.content == "-0.5 -500000000 (1969, 12, 31)"


def test_without_one_it_is_the_machines_time():
    output, _ = ask("import datetime, time; print(time.time(), datetime.datetime.now().timestamp())")
    assert all(abs(float(seconds) - time.time()) < 60 for seconds in output.content.split())


def test_the_bill_is_for_the_programs_seconds():
    output, price = ask("import time; time.sleep(0.5)")
    assert price == Price(call_usd=0.25, second_usd=2.0)
    assert 0.5 <= output.usage.seconds < 10
    assert price.cost_usd(output.usage) == 0.25 + 2.0 * output.usage.seconds

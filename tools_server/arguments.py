"""Checks a call's arguments against its tool's JSON schema, before the tool or the environment sees it."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jsonschema_rs
from jsonschema.validators import validator_for

MAX_CHARACTERS = 200
MAX_SEEN = 64
Check = Callable[[dict[str, Any]], str | None]
"""Arguments -> None, or what is wrong with them and where."""


_seen: dict[int, tuple[list[dict[str, Any]], Mapping[str, Check]]] = {}
"""Lists met before: one that all sessions of an environment share need not be spelled out for each."""


def compile_checks(tools: list[dict[str, Any]]) -> Mapping[str, Check]:
    """A check per tool name of OpenAI function schemas. Raises ValueError on a tool without a name."""
    known = _seen.get(id(tools))
    if known is not None and known[0] is tools:
        return known[1]
    checks = _compile(json.dumps(tools, sort_keys=True))
    if len(_seen) >= MAX_SEEN:
        _seen.clear()
    _seen[id(tools)] = (tools, checks)
    return checks


@functools.lru_cache(maxsize=256)
def _compile(tools_json: str) -> Mapping[str, Check]:
    """Sessions of one environment publish the same schemas, so each list is compiled once per process."""
    checks: dict[str, Check] = {}
    for tool in json.loads(tools_json):
        function = tool.get("function", {})
        if "name" not in function:
            raise ValueError(f"a tool without function.name: {json.dumps(tool)[:MAX_CHARACTERS]}")
        schema = function.get("parameters", {"type": "object"})
        checks[function["name"]] = functools.partial(_first_error, _acceptor(schema), validator_for(schema)(schema))
    return checks


def _acceptor(schema: dict[str, Any]) -> Callable[[Any], bool]:
    """Says quickly of most arguments that are right that they are; what it doubts is for jsonschema to judge."""
    doubtful = lambda arguments: False  # noqa: E731
    if '"pattern' in json.dumps(schema):  # its regular expressions are JavaScript's, the other's are Python's
        return doubtful
    try:
        return jsonschema_rs.validator_for(schema, retriever=_refuse).is_valid
    except ValueError:  # a reference into the world
        return doubtful


def _refuse(uri: str) -> NoReturn:
    raise ValueError(f"a schema refers to {uri}, outside of itself")


def _first_error(accepts: Callable[[Any], bool], validator: Any, arguments: dict[str, Any]) -> str | None:
    """The first error in the order of paths, so that siblings with the same mistake read the same words."""
    try:
        if accepts(arguments):
            return None
    except ValueError:  # too deep for it
        pass
    errors = [(error.json_path, error.message) for error in validator.iter_errors(arguments)]
    if not errors:
        return None
    path, message = min(errors)
    return f"{path}: {message}"[:MAX_CHARACTERS]

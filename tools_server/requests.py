"""Reads requests: JSON bodies into wire records, with one line that says what is wrong and where.

The checks are written by hand, because they run once per call.
"""

import json
import math
from typing import Any, NamedTuple, TypeVar

from aiohttp import web

from tools_server.errors import BadRequest
from tools_server.reward_groups import preference_mistake
from tools_server.wire import MAX_ITEMS, Call, ForkSession, OpenSession

T = TypeVar("T")
JSON_TYPES: dict[Any, str] = {str: "a string", dict: "an object", int: "an integer", float: "a number of at least 0"}


class Kind(NamedTuple):
    """A field's type, and whether it may be left out."""

    type: type
    optional: bool = False


FIELDS: dict[type, dict[str, Kind]] = {
    OpenSession: {
        "session_id": Kind(str),
        "environment": Kind(str),
        "setup": Kind(dict),
        "seed": Kind(int, True),
        "preference": Kind(dict, True),
    },
    ForkSession: {"session_id": Kind(str), "new_session_id": Kind(str), "num_calls": Kind(int, True)},
    Call: {
        "session_id": Kind(str),
        "call_id": Kind(str),
        "name": Kind(str),
        "arguments": Kind(dict),
        "deadline_s": Kind(float, True),
    },
}


INTEGERS = {kind: {n for n, field in fields.items() if field.type is int} for kind, fields in FIELDS.items()}


def to_integer(value: Any) -> Any:
    """2 of 2.0, which JSON does not tell apart; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


async def read_object(request: web.Request, *allowed: str) -> dict[str, Any]:
    """The request's JSON object, which has no other keys. An empty body is {}."""
    body = await request.read()
    try:
        payload = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(payload, dict):
        raise BadRequest(f"expected an object, got {type(payload).__name__}")
    if not payload.keys() <= set(allowed):
        raise BadRequest(f"expected the fields {', '.join(allowed) or '(none)'}; got {', '.join(payload)}")
    return payload


async def read_items(request: web.Request, key: str) -> list[Any]:
    """The list under `key`, the only one, of the request's JSON object."""
    body = await request.read()
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(payload, dict) or payload.keys() != {key} or not isinstance(payload[key], list):
        raise BadRequest(f'expected {{"{key}": [...]}} and nothing else')
    if len(payload[key]) > MAX_ITEMS:
        raise BadRequest(f"{key}: got {len(payload[key])} items, at most {MAX_ITEMS} are allowed in a request")
    return payload[key]


def to_record(item: Any, where: str, kind: type[T]) -> T:
    """`item` as a wire record."""
    if not isinstance(item, dict):
        raise BadRequest(f"{where}: expected an object, got {type(item).__name__}")
    fields = FIELDS[kind]
    for name in INTEGERS[kind] & item.keys():
        item = item | {name: to_integer(item[name])}
    try:
        record = kind(**item)
    except TypeError:
        names = ", ".join(name for name, field in fields.items() if not field.optional)
        raise BadRequest(f"{where}: expected the fields {names}; got {', '.join(item)}") from None
    for name, value in item.items():
        if not _fits(value, fields[name]):
            raise BadRequest(f"{where}.{name}: expected {JSON_TYPES[fields[name].type]}")
    if "preference" in item and (mistake := preference_mistake(item["preference"])):
        raise BadRequest(f"{where}.{mistake}")
    return record


def to_records(items: list[Any], key: str, kind: type[T]) -> list[T]:
    return [to_record(item, f"{key}[{i}]", kind) for i, item in enumerate(items)]


def _fits(value: Any, field: Kind) -> bool:
    if field.type is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value is None or (number and 0 <= value < math.inf)
    return isinstance(value, field.type) and not isinstance(value, bool)

"""The wire as an OpenAPI 3.1 document (`GET /v1/openapi.json`), built from the records of `wire.py`."""

import copy
import functools
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from tools_server import wire
from tools_server.reward_groups import MOST_WEIGHT

ERRORS = {
    400: "malformed",
    401: "no token, or not one of this server's",
    403: "a session's token that may not do this",
    404: "the session, or the tool that would run a program, is not here",
    405: "another method",
    409: "what is asked for contradicts itself or the session's calls, e.g. another one had this call_id",
    413: "longer than max_request_bytes",
    429: "a cap is reached and nothing was accepted; Retry-After says when to try again",
    500: "a bug of the server",
}
RECORDS = (
    wire.OpenSession,
    wire.SessionOpened,
    wire.ForkSession,
    wire.Snapshot,
    wire.Call,
    wire.CallResult,
    wire.SessionRecord,
    wire.RewardGroup,
    wire.Reward,
)
REQUESTS = ("OpenSession", "ForkSession", "Call", "RewardGroup")
SCHEMAS = "#/components/schemas/"
OBJECT: dict[str, Any] = {"type": "object"}


class Operation(NamedTuple):
    """One method of one path. Schemas are JSON Schema; None: no body."""

    method: str
    path: str
    summary: str
    body: dict[str, Any] | None
    answer: dict[str, Any]


def document() -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, Any] = {}
    for operation in _operations():
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    scheme = {"type": "http", "scheme": "bearer", "description": "the server's token, or a session's own"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jorch tool server", "version": str(wire.API_VERSION)},
        "paths": paths,
        "components": {"schemas": dict(_schemas()), "securitySchemes": {"token": scheme}},
    }


@functools.cache
def _schemas() -> dict[str, Any]:
    """Of the wire's records; those that are sent have no other fields."""
    schemas: dict[str, Any] = {}
    for record in RECORDS:
        schema = TypeAdapter(record).json_schema(ref_template=SCHEMAS + "{model}")
        schema.pop("$defs", None)
        schemas[record.__name__] = schema | {"description": (record.__doc__ or "").split("\n\n")[0]}
    for name in REQUESTS:
        schemas[name]["additionalProperties"] = False
    for number in schemas["Call"]["properties"]["deadline_s"]["anyOf"]:
        if number["type"] == "number":
            number["minimum"] = 0
    weight = {"minimum": -MOST_WEIGHT, "maximum": MOST_WEIGHT}
    for name in ("OpenSession", "SessionRecord"):
        schemas[name]["properties"]["preference"]["additionalProperties"] |= weight
    record = schemas["SessionRecord"]["properties"]
    record["outcome"] |= {"minimum": 0, "maximum": 1}
    for field in (record["cost_usd"], record["latency_s"], record["tool_counts"]["additionalProperties"]):
        field["minimum"] = 0
    schemas["RewardGroup"]["properties"]["records"]["minItems"] = 1
    schemas["Error"] = _closed(error={"type": "string", "description": "one line"})
    return schemas


def _operations() -> list[Operation]:
    one = "/v1/sessions/{id}"
    # The path names the session, so that a body must not.
    call = copy.deepcopy(_schemas()["Call"])
    fork = copy.deepcopy(_schemas()["ForkSession"])
    opening = copy.deepcopy(_schemas()["OpenSession"])
    for schema in (call, fork, opening):
        del schema["properties"]["session_id"]
        schema["required"].remove("session_id")
    seconds = {"type": "number", "exclusiveMinimum": 0}
    program = _closed(tool={"type": "string"}, source={"type": "string"}, timeout_s=seconds)
    nothing, num_calls = _closed(), _closed(num_calls={"type": "integer", "minimum": -1})
    return [
        Operation(
            "post",
            "/v1/sessions",
            "Open sessions.",
            _items("sessions", "OpenSession"),
            _answers("sessions", "SessionOpened"),
        ),
        Operation("post", "/v1/calls", "Call tools.", _items("calls", "Call"), _answers("results", "CallResult")),
        Operation(
            "post", "/v1/forks", "Fork sessions.", _items("forks", "ForkSession"), _answers("sessions", "SessionOpened")
        ),
        Operation(
            "post",
            "/v1/finish",
            "Judge sessions.",
            _list("session_ids", {"type": "string"}),
            _answers("records", "SessionRecord"),
        ),
        Operation(
            "post",
            "/v1/rewards",
            "Score siblings by their records.",
            _items("groups", "RewardGroup"),
            _list("rewards", {"type": "array", "items": _ref("Reward")}, most=None),
        ),
        Operation(
            "post",
            "/v1/heartbeats",
            "Begin leases anew.",
            _list("session_ids", {"type": "string"}),
            _list("renewed", {"type": "boolean"}, most=None),
        ),
        Operation("put", one, "Open the session.", opening, _ref("SessionOpened")),
        Operation("post", f"{one}/call", "Call a tool.", call, _ref("CallResult")),
        Operation(
            "post",
            f"{one}/call_batch",
            "Writes in order, reads side by side.",
            _list("calls", call),
            _answers("results", "CallResult"),
        ),
        Operation("post", f"{one}/heartbeat", "Begin the lease anew.", nothing, _ref("Snapshot")),
        Operation("post", f"{one}/snapshot", "Where the session stands.", nothing, _ref("Snapshot")),
        Operation("post", f"{one}/restore", "Take back all calls but the first.", num_calls, _ref("Snapshot")),
        Operation("post", f"{one}/fork", "Open another session as this one was.", fork, _ref("SessionOpened")),
        Operation("post", f"{one}/finish", "Judge the session.", nothing, _ref("SessionRecord")),
        Operation(
            "delete", one, "Forget the session; its calls are ended.", None, _closed(deleted={"type": "boolean"})
        ),
        Operation("post", "/v1/programs", "Run a program in a sandbox of a tool's.", program, OBJECT),
        Operation("get", "/v1/experts", "Catalogue of simulated experts.", None, _closed(experts=OBJECT)),
        Operation("get", "/v1/tools", "OpenAI function schemas.", None, _list("tools", OBJECT, most=None)),
    ]


def _described(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path}".replace("/{id}", "_one").replace("/", "_"),
        "security": [{"token": []}],
        "responses": {"200": {"description": "done", "content": _json(operation.answer)}}
        | {
            str(status): {"description": meaning, "content": _json(_ref("Error"))} for status, meaning in ERRORS.items()
        },
    }
    if "{id}" in operation.path:
        described["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(operation.body)}
    return described


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": SCHEMAS + name}


def _closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _list(key: str, item: dict[str, Any], most: int | None = wire.MAX_ITEMS) -> dict[str, Any]:
    limit = {} if most is None else {"maxItems": most}
    return _closed(**{key: {"type": "array", "items": item, **limit}})


def _items(key: str, record: str) -> dict[str, Any]:
    return _list(key, _ref(record))


def _answers(key: str, record: str) -> dict[str, Any]:
    return _list(key, _ref(record), most=None)

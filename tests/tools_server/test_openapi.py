"""The served OpenAPI document, and requests made up from it: none is a 500, and every answer is as the document says."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

from tools_server import openapi
from tools_server.app import make_app
from tools_server.config import ServerConfig

EXPERT = {
    "kind": "simulated",
    "skill": {"default": 2},
    "usd_per_million_tokens": 1,
    "tokens_per_call": 100,
    "latency_s": 0.1,
}
NULL = {
    "kind": "constant",
    "answer": "yes",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
}
TOKEN = "sesame"


@contextlib.contextmanager
def serving(folder):
    """A server process with a token; its url."""
    config = {"tools": {"null": NULL}, "experts": {"e": EXPERT}, "max_sessions": 50, "traces": str(folder / "t.jsonl")}
    (folder / "server.yaml").write_text(json.dumps(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "tools_server", str(folder / "server.yaml"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JORCH_TOOLS_TOKEN": TOKEN},
        text=True,
    )
    try:
        yield process.stdout.readline().split()[-1], process
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()


def fetch(url, path):
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def fuzz(url, max_examples):
    """Positive and negative requests to every operation; the number of operations."""
    import schemathesis  # takes seconds

    schema = schemathesis.openapi.from_dict(fetch(url, "/v1/openapi.json"))
    num_operations = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        num_operations += 1

        def check(case):
            case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20)

        for mode in schemathesis.GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            limits = settings(
                max_examples=max_examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            limits(given(strategy)(check))()
    return num_operations


def test_every_route_is_in_the_document_and_nothing_else():
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in make_app(ServerConfig.model_validate({})).router.routes()
        if route.resource.canonical.startswith("/v1/") and route.method != "HEAD"
    }
    paths = openapi.document()["paths"]
    described = {(method, path) for path, methods in paths.items() for method in methods}
    assert served - described == {("get", "/v1/openapi.json")}
    assert described <= served


def test_schemas_are_schemas():
    for schema in openapi.document()["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.slow
def test_made_up_requests(tmp_path):
    """And no slot is leaked: every session that is open can be deleted, and a new one opened."""
    with serving(tmp_path) as (url, process):
        assert fuzz(url, max_examples=40) == 18
        assert process.poll() is None
        assert fetch(url, "/healthz")["sessions"] <= 50

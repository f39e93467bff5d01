"""Blocking requests to a vLLM server's control surface, where nothing else runs meanwhile."""

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from jorch.export.probe import Probe


def post(url: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 60.0, **query: str) -> Any:
    """The JSON that `path` answers, or else its text; None for an empty body.

    Raises ConnectionError naming the server and its answer.
    """
    query_string = f"?{urllib.parse.urlencode(query)}" if query else ""
    request = urllib.request.Request(
        url + path + query_string, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"vLLM at {url} answers {path} with HTTP {error.code}: {_line(error.read())}") from error
    except OSError as error:
        raise ConnectionError(f"vLLM at {url} does not answer {path}: {error}") from error
    try:
        return json.loads(text) if text.strip() else None
    except ValueError:
        return text.decode(errors="replace")


def is_healthy(url: str, timeout_s: float = 5.0) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout_s) as response:
            return response.status == 200
    except OSError:
        return False


def models(url: str) -> list[str]:
    """What the server serves, by name. Raises ConnectionError naming it."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30.0) as response:
            return [model["id"] for model in json.loads(response.read())["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConnectionError(f"vLLM at {url} does not tell its models: {error}") from error


def score(url: str, probe: Probe, *, salt: str, tokens_only: bool, model: str | None = None) -> list[float]:
    """The server's log-probabilities of the probe's tokens after the first, by the policy or the given `model`.

    `salt` keeps cached prefixes out.
    """
    model = model or MODEL
    ids = list(probe.token_ids)
    if tokens_only:
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        body = {"model": model, "token_ids": ids, "cache_salt": salt, "sampling_params": sampling}
        answer = post(url, "/inference/v1/generate", body)
        entries = answer["prompt_logprobs"]
    else:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "cache_salt": salt}
        entries = post(url, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]


MODEL = "policy"
"""The name under which every server serves what is trained."""
BASE = "base"
"""The name of the frozen weights where that is an adapter of them."""


def _line(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.decode(errors="replace").split())[:200]

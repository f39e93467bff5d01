"""The server's configuration: one frozen model, read from one YAML file. The bearer token is not part of it.

A mistake in the file is one line: `FILE:LINE: unknown key 'experts.a.skil'; did you mean 'experts.a.skill'?`.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

TOKEN_VARIABLE = "JORCH_TOOLS_TOKEN"
"""Environment variable with the bearer token that clients must send; unset = none asked."""
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExpertProfile(Section):
    """What a model behind a role alias can do and what it costs."""

    kind: Literal["simulated"]
    skill: dict[str, PositiveInt] = Field(min_length=1, description='level by domain, or by "default"')
    usd_per_million_tokens: float = Field(ge=0)
    tokens_per_call: PositiveInt
    latency_s: float = Field(ge=0, description="of one call, as billed")
    reliability: float = Field(1.0, ge=0, le=1, description="share of tasks on which it does not fail by chance")


class ServerConfig(Section):
    """Everything about a server but its token."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8900, ge=0, le=65535, description="0 = a free one")
    experts: dict[str, ExpertProfile] = Field({}, description="catalogue of experts by name")
    seed: int = Field(0, description="of the simulated experts' chance failures")
    time_scale: float = Field(0.0, ge=0, description="seconds slept per second of billed latency")
    max_sessions: PositiveInt = Field(4096, description="open at once; as many finished ones are remembered")
    session_ttl_s: PositiveFloat = Field(3600.0, description="an idle session is forgotten after it")
    max_request_bytes: PositiveInt = Field(64 * 1024**2, description="of one request's body")
    worker_threads: PositiveInt = Field(16, description="for environments whose calls block")


def load_config(path: Path) -> ServerConfig:
    """Read `path`. Raises ValueError with one line that names file, line and key."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, YamlLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}:1: got {type(values).__name__}, expected a mapping of keys to values")
    try:
        return ServerConfig.model_validate(values)
    except ValidationError as error:
        root = yaml.compose(text, YamlLoader)
        # A misspelt key is also a missing one: the missing ones come last.
        found = [(e["type"] == "missing", _line(root, e["loc"]), _explain(e)) for e in error.errors()]
        _, line, explanation = min(found)
        raise ValueError(f"{path}:{line}: {explanation}") from None


def _line(node: Any, location: tuple[int | str, ...]) -> int:
    """Line (from 1) of the deepest key of `location` that the file has."""
    line = node.start_mark.line
    for part in location:
        if not isinstance(node, yaml.MappingNode):
            break
        pairs = [(key, value) for key, value in node.value if key.value == str(part)]
        if not pairs:
            break
        key, node = pairs[-1]
        line = key.start_mark.line
    return line + 1


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "missing":
        return f"missing key {key!r}"
    if error["type"] != "extra_forbidden":
        return f"{key!r}: {error['msg']}; got {str(error['input'])[:60]!r}"
    if location[-1] == "token":
        return f"unknown key {key!r}; the token is never in a file: set {TOKEN_VARIABLE}"
    model = ServerConfig if len(location) == 1 else ExpertProfile
    close = difflib.get_close_matches(location[-1], model.model_fields, n=1)
    if close:
        return f"unknown key {key!r}; did you mean {'.'.join([*location[:-1], close[0]])!r}?"
    return f"unknown key {key!r}; allowed here: {', '.join(model.model_fields)}"

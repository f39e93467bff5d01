"""What a tool is to the server: a declaration (`ToolSpec`), and a coroutine that carries out one call.

One declaration is rendered as an OpenAI function schema, as Hermes/Qwen text and, in `mcp_facade.py`, as an MCP tool.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tools_server.config import Section

SideEffect = Literal["pure", "read", "write"]
"""pure: depends on its arguments only; read: on the world too; write: changes the world."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a call is charged, in USD. Parts that a tool does not use are 0.

    Example: Price(call_usd=0.001) for a search, Price(input_usd=2.5e-6, output_usd=1e-5) for a model.
    """

    call_usd: float = 0.0
    second_usd: float = 0.0
    """A second of the tool's own work, e.g. of a sandbox."""
    input_usd: float = 0.0
    """An input token that was not cached."""
    output_usd: float = 0.0
    cached_usd: float = 0.0
    """An input token that the provider had cached."""

    def cost_usd(self, usage: "Usage") -> float:
        """The charge for one call."""
        fresh_tokens = usage.input_tokens - usage.cached_tokens
        return (
            self.call_usd
            + self.second_usd * usage.seconds
            + self.input_usd * fresh_tokens
            + self.cached_usd * usage.cached_tokens
            + self.output_usd * usage.output_tokens
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What one call used. `input_tokens` include the cached ones."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.cached_tokens <= self.input_tokens or self.output_tokens < 0 or self.seconds < 0:
            raise ValueError(f"usage counts are at least 0, and cached tokens are input tokens too; got {self}")


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool's declaration.

    Example: ToolSpec("search", "Find passages.", {"type": "object", "properties": {"query": {"type": "string"}}})
    """

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON Schema of the arguments, an object's."""
    side_effect: SideEffect = "read"
    timeout_s: float = 30.0
    """Of the tool's own work: neither queues nor retries count."""
    version: str = "1"
    """Part of a recording's key: another version's answers are not replayed."""
    price: Price = field(default_factory=Price)
    latency_s: float | None = None
    """Billed for a call, whatever it took; None: the measured seconds are billed."""

    @property
    def openai(self) -> dict[str, Any]:
        """The OpenAI function schema."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """How one call went. `error` is None or one of "tool_error", "timeout", "infra_error", "budget_exceeded"."""

    content: str
    error: str | None = None
    usage: Usage = field(default_factory=Usage)
    work_s: float = 0.0
    """Measured: the tool's own work, without queue and retries."""
    wait_s: float = 0.0
    """Measured: queue, back-off and failed attempts."""
    inner_usd: float = 0.0
    """What its own calls of other tools cost."""
    inner_s: float = 0.0
    """The billed seconds of those calls."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a tool may know of the session that calls it."""

    session_id: str
    seed: int
    depth: int = 0
    """How many orchestrators stand above this one."""
    simulation: Section | None = None
    """What simulated experts know of the task (a `tools.simulated.Simulation`)."""
    clock_s: float | None = None
    """The session's moment, in seconds since 1970 (UTC); None = the machine's clock."""


class Tool(Protocol):
    """A configured tool. `call` runs on the event loop and never blocks it."""

    spec: ToolSpec

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        """Carry out a call whose arguments fit the schema. A failure is an output with `error` set."""
        ...


def hermes_text(specs: Sequence[ToolSpec]) -> str:
    """The tools' part of a system prompt as Qwen3's chat template words it (Hermes function calling)."""
    lines = "\n".join(json.dumps(spec.openai, ensure_ascii=False) for spec in specs)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def billed_s(spec: ToolSpec, output: ToolOutput) -> float:
    """The latency that counts for the reward: the declared one, so that load is no reward noise."""
    return output.work_s + output.inner_s if spec.latency_s is None else spec.latency_s


def billed_usd(price: Price, spec: ToolSpec, output: ToolOutput) -> float:
    """The charge for a call and for those below it. Seconds are billed as the latency is: the declared ones, if any."""
    usage = output.usage
    if usage.seconds and spec.latency_s is not None:
        usage = replace(usage, seconds=spec.latency_s)
    return price.cost_usd(usage) + output.inner_usd


def object_schema(properties: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """A closed object schema."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }

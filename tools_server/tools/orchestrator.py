"""An expert that is an orchestrator: a chat tool whose model may call tools of this server before it answers.

Its model is any that takes `tools` and answers with `tool_calls`, such as one that was trained here and is served by
vLLM. Its tools may be orchestrators again; `MAX_DEPTH` ends the recursion. The bill is its own tokens at its price plus
its calls at the server's prices.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from tools_server.arguments import Check
from tools_server.config import ChatConfig
from tools_server.endpoint import EndpointFailure, RequestRefused
from tools_server.tool import CallContext, Price, Tool, ToolOutput, Usage, billed_s, billed_usd
from tools_server.tools.chat import ChatTool, read_completion


class Tools(Protocol):
    """The server's tools, as `toolbox.Toolbox` has them."""

    tools: dict[str, Tool]
    checks: Mapping[str, Check]

    async def call(self, name: str, arguments: dict[str, Any], context: CallContext) -> ToolOutput: ...


class OrchestratorTool(ChatTool):
    """One model and the tools that it may call. Use `call` after `bind`."""

    def __init__(self, name: str, config: ChatConfig, price: Price) -> None:
        super().__init__(name, config, price)
        self._tools: Tools | None = None

    def bind(self, tools: Tools) -> None:
        """Give it the started tools. Raises ValueError where one that the config names is missing."""
        for name in self._config.tools:
            if name not in tools.tools:
                known = ", ".join(tools.tools)
                raise ValueError(f"tools.{self.spec.name}.tools: unknown tool {name!r}; this server has {known}")
        self._tools = tools
        if any(tools.tools[name].spec.side_effect == "write" for name in self._config.tools):
            self.spec = replace(self.spec, side_effect="write")

    async def fault(self) -> str | None:
        """As of any chat tool; its own tools answer for themselves."""
        output = await super().ask([{"role": "user", "content": "Say yes."}], CallContext("check", seed=0))
        return output.content if output.error else None

    async def ask(self, messages: list[dict[str, Any]], context: CallContext) -> ToolOutput:
        """The answer after as many turns as it takes. What a failed turn had cost is not billed."""
        assert self._tools is not None
        schemas = [self._tools.tools[name].spec.openai for name in self._config.tools]
        total = ToolOutput("")
        messages = list(messages)
        for _ in range(self._config.max_turns):
            try:
                exchange = await self.exchange(messages, context.seed, context.depth, schemas)
                content, usage = read_completion(exchange.payload)
            except RequestRefused as error:
                return replace(total, content=f"the model does not take this conversation: {error}", error="tool_error")
            except (EndpointFailure, ValueError) as error:
                return replace(total, content=str(error), error="infra_error")
            total = replace(
                total,
                usage=_sum(total.usage, usage),
                work_s=total.work_s + exchange.work_s,
                wait_s=total.wait_s + exchange.wait_s,
            )
            calls = exchange.payload["choices"][0]["message"].get("tool_calls") or []
            if not calls:
                return replace(total, content=content)
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            for call in calls:
                output, cost_usd, latency_s = await self._carry_out(call, context)
                total = replace(total, inner_usd=total.inner_usd + cost_usd, inner_s=total.inner_s + latency_s)
                if output.error == "infra_error":
                    return replace(total, content=output.content, error="infra_error")
                messages.append({"role": "tool", "tool_call_id": call.get("id", ""), "content": output.content})
        return replace(total, content=f"no answer after {self._config.max_turns} turns", error="tool_error")

    async def _carry_out(self, call: Any, context: CallContext) -> tuple[ToolOutput, float, float]:
        """The output of one call, what it cost and the seconds that are billed."""
        assert self._tools is not None
        try:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"] or "{}")
        except (KeyError, TypeError, ValueError) as error:
            return ToolOutput(f"error: no call ({type(error).__name__}: {error})", "tool_error"), 0.0, 0.0
        if name not in self._config.tools:
            allowed = ", ".join(self._config.tools)
            return ToolOutput(f"unknown tool; allowed: {allowed}", "tool_error"), 0.0, 0.0
        mistake = self._tools.checks[name](arguments) if isinstance(arguments, dict) else "$: expected an object"
        if mistake:
            return ToolOutput(mistake, "tool_error"), 0.0, 0.0
        output = await self._tools.call(name, arguments, replace(context, depth=context.depth + 1))
        spec = self._tools.tools[name].spec
        if output.error == "budget_exceeded":
            return output, 0.0, 0.0
        return output, billed_usd(spec.price, spec, output), billed_s(spec, output)


def _sum(first: Usage, second: Usage) -> Usage:
    return Usage(
        first.input_tokens + second.input_tokens,
        first.output_tokens + second.output_tokens,
        first.cached_tokens + second.cached_tokens,
        first.seconds + second.seconds,
    )

"""The tool kind *chat*: a model behind an OpenAI-compatible endpoint, asked with one prompt. Experts are of this kind.

An expert may itself be an orchestrator: with `tools`, on this server (`orchestrator.py`); or behind an endpoint that
calls back into this one, to which every request says in a header how many orchestrators stand above it. `MAX_DEPTH`
ends the recursion.
"""

from collections.abc import Sequence
from typing import Any

from tools_server.config import ChatConfig
from tools_server.endpoint import Endpoint, EndpointFailure, EndpointLimits, Exchange, RequestRefused
from tools_server.tool import CallContext, Price, ToolOutput, ToolSpec, Usage, object_schema

DEPTH_HEADER = "X-Jorch-Depth"
MAX_DEPTH = 4
DESCRIPTION = "Asks the model {model}, which sees nothing but the prompt, and returns its answer."


class ChatTool:
    """One endpoint and model. The answer's text is the observation; `usage` is what the endpoint counted."""

    def __init__(self, name: str, config: ChatConfig, price: Price) -> None:
        prompt = {"type": "string", "description": "everything that the model is to know", "minLength": 1}
        self.spec = ToolSpec(
            name,
            config.description or DESCRIPTION.format(model=config.model),
            object_schema({"prompt": prompt}, ["prompt"]),
            timeout_s=config.timeout_s,
            version=config.version,
            price=price,
            latency_s=config.latency_s,
        )
        self._config = config

    async def start(self) -> list["ChatTool"]:
        config = self._config
        limits = EndpointLimits(
            timeout_s=config.timeout_s,
            retries=config.retries,
            backoff_s=config.backoff_s,
            concurrency=config.concurrency,
            requests_per_minute=config.requests_per_minute,
            breaker_failures=config.breaker_failures,
            breaker_pause_s=config.breaker_pause_s,
            max_answer_bytes=config.max_answer_bytes,
        )
        self._endpoint = Endpoint(config.url, limits, config.key_variable)
        try:
            await self._endpoint.start()
        except ValueError as error:
            raise ValueError(f"tools.{self.spec.name}: {error}") from None
        return [self]

    async def close(self) -> None:
        await self._endpoint.close()

    async def fault(self) -> str | None:
        """Why the endpoint cannot be used, or None: asked with the shortest request there is."""
        output = await self.ask([{"role": "user", "content": "Say yes."}], CallContext("check", seed=0))
        return output.content if output.error else None

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        if context.depth >= MAX_DEPTH:
            return ToolOutput(f"{MAX_DEPTH} orchestrators call one another already", "budget_exceeded")
        messages = [{"role": "user", "content": shorten(arguments["prompt"], self._config.max_prompt_characters)}]
        if self._config.system is not None:
            messages.insert(0, {"role": "system", "content": self._config.system})
        return await self.ask(messages, context)

    def _request(self, messages: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        config = self._config
        sampling = {"temperature": config.temperature, "top_p": config.top_p}
        return {
            "model": config.model,
            "messages": messages,
            "max_tokens": config.max_output_tokens,
            "seed": seed,
            **{name: value for name, value in sampling.items() if value is not None},
            **config.extra,
        }

    async def exchange(
        self, messages: list[dict[str, Any]], seed: int, depth: int, tools: Sequence[dict[str, Any]] = ()
    ) -> Exchange:
        """One request. Raises what `Endpoint.post` does."""
        payload = self._request(messages, seed) | ({"tools": list(tools)} if tools else {})
        return await self._endpoint.post("/chat/completions", payload, {DEPTH_HEADER: str(depth + 1)})

    async def next_message(
        self, messages: list[dict[str, Any]], seed: int, tools: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """The assistant message that follows `messages`, with its tool calls. Raises what `Endpoint.post` does, and
        ValueError where the answer is no chat completion.
        """
        exchange = await self.exchange(messages, seed, 0, tools)
        try:
            message = exchange.payload["choices"][0]["message"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self._config.url}: no chat completion ({type(error).__name__}: {error})") from None
        if not isinstance(message, dict):
            raise ValueError(f"{self._config.url}: a chat completion whose message is no object")
        return message

    async def ask(self, messages: list[dict[str, Any]], context: CallContext) -> ToolOutput:
        """One completion of `messages`."""
        try:
            exchange = await self.exchange(messages, context.seed, context.depth)
            content, usage = read_completion(exchange.payload)
        except RequestRefused as error:
            return ToolOutput(f"the model does not take this prompt: {error}", "tool_error")
        except EndpointFailure as failure:
            return ToolOutput(str(failure), "infra_error", wait_s=failure.wait_s)
        except ValueError as error:
            return ToolOutput(f"{self._config.url}: {error}", "infra_error")
        return ToolOutput(content, None, usage, exchange.work_s, exchange.wait_s)


def read_completion(payload: dict[str, Any]) -> tuple[str, Usage]:
    """Text and usage of a chat completion. Raises ValueError where the payload is none.

    Usage is required: a call that cannot be priced must not look free.
    """
    try:
        content = payload["choices"][0]["message"]["content"] or ""
        counted = payload["usage"]
        details = counted.get("prompt_tokens_details") or {}
        usage = Usage(
            int(counted["prompt_tokens"]), int(counted["completion_tokens"]), int(details.get("cached_tokens") or 0)
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion with usage ({type(error).__name__}: {error})") from None
    if not isinstance(content, str):
        raise ValueError(f"a chat completion whose content is no text but {type(content).__name__}")
    return content, usage


def shorten(text: str, max_characters: int) -> str:
    """`text`, or its beginning and end with a mark between."""
    if len(text) <= max_characters:
        return text
    half = max(1, (max_characters - 5) // 2)
    return f"{text[:half]}\n...\n{text[-half:]}"

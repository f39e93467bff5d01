"""A model behind an OpenAI-compatible endpoint plays tasks: same tools, ledger and verdicts as for a trained one.

What differs is the chat: the endpoint renders messages and tools by its own template and parses the calls itself.
"""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jorch.config import EvalConfig
from jorch.evals.chat_endpoint import ChatEndpoint, ConversationRefused
from jorch.rollout.driver import MALFORMED
from jorch.rollout.outcomes import EvalRow, row_from
from jorch.rollout.own_tokens import OwnTokens
from jorch.rollout.tool_client import Call, CallResult, OpenSession, ToolClient
from jorch.types import Task, Termination

_LOST = frozenset({"unknown_session", "session_over", "infra_error"})


async def play_chat(
    tasks: Sequence[Task],
    tools: ToolClient,
    endpoint: ChatEndpoint,
    config: EvalConfig,
    temperature: float,
    advance: Callable[[], object] = lambda: None,
) -> list[EvalRow]:
    """One row per task, in order; tasks that the infrastructure lost have none.

    Raises EndpointDown, ToolServerDown, and ValueError where either refuses what it is asked.
    """
    slots = asyncio.Semaphore(config.sampler.max_rows)

    async def play(task: Task) -> EvalRow | None:
        async with slots:
            for _ in range(config.rollout.trajectory_retries + 1):
                row = await _Conversation(task, tools, endpoint, config, temperature).play()
                if row is not None:
                    break
            advance()
            return row

    try:
        async with asyncio.TaskGroup() as running:
            played = [running.create_task(play(task)) for task in tasks]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [row for one in played if (row := one.result()) is not None]


@dataclass
class _Conversation:
    task: Task
    tools: ToolClient
    endpoint: ChatEndpoint
    config: EvalConfig
    temperature: float

    async def play(self) -> EvalRow | None:
        """None where the tool server lost the session."""
        digest = hashlib.blake2b(f"{self.config.seed}/{self.task.task_id}".encode(), digest_size=8).digest()
        self.session_id = f"{uuid.uuid4().hex}/{self.task.task_id}"
        task, seed = self.task, int.from_bytes(digest, "big") >> 1
        session = OpenSession(self.session_id, task.environment, task.setup, seed, task.preference)
        opened = await self.tools.open(session)
        if opened.error:
            raise ValueError(f"the tool server refused task {task.task_id}: {opened.error}")
        self.messages: list[dict[str, Any]] = list(opened.messages or task.messages)
        self.schemas = list(opened.tools or task.tools)
        self.malformed, self.own = 0, OwnTokens()
        with self.tools.keep(self.session_id):
            termination = await self._converse()
        record = await self.tools.finish(self.session_id)
        if termination == "infra_error" or record.error in _LOST:
            return None
        price = self.config.rollout.orchestrator
        if record.error:
            termination = "env_error"
        return row_from(
            task,
            record.outcome if termination in ("answered", "ended") else 0.0,
            record.cost_usd + self.own.cost_usd(price),
            record.latency_s + self.own.latency_s(price),
            record.tool_counts,
            format_valid=self.malformed == 0,
            termination=termination,
        )

    async def _converse(self) -> Termination:
        for number in range(self.config.rollout.max_turns):
            body = {
                "messages": self.messages,
                "temperature": self.temperature,
                "max_tokens": self.config.rollout.max_tokens_per_turn,
            }
            if self.schemas:
                body["tools"] = self.schemas
            try:
                answer = await self.endpoint.complete(body)
            except ConversationRefused:
                if not number:
                    raise ValueError(
                        f"endpoint {self.endpoint.url} refused task {self.task.task_id} at its first request"
                    ) from None
                return "max_tokens"
            self.own = self.own.with_usage(answer.get("usage") or {})
            choice = answer["choices"][0]
            ending = await self._act(number, choice["message"], choice.get("finish_reason"))
            if ending:
                return ending
        return "max_turns"

    async def _act(self, number: int, message: dict[str, Any], finish_reason: str | None) -> Termination | None:
        """Execute the calls of one answer in order; why the conversation ends after them, or None."""
        calls, content = message.get("tool_calls") or [], message.get("content") or ""
        self.messages.append({"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})})
        for index, call in enumerate(calls):
            result = await self._call(f"{number}.{index}", call["function"])
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result.content})
            if ending := self._ending(result):
                return ending
        if not calls:
            said = Call(self.session_id, f"{number}.0", "", {"content": content})
            result = await self.tools.call(said)
            self.messages.append({"role": "user", "content": result.content})
            if ending := self._ending(result):
                return ending
        if self.malformed >= self.config.rollout.max_malformed_calls:
            return "invalid"
        return "max_tokens" if finish_reason == "length" else None

    async def _call(self, call_id: str, function: dict[str, Any]) -> CallResult:
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            line = "error: the arguments are no JSON object"
            return CallResult(self.session_id, call_id, function["name"], line, 0.0, 0.0, "invalid_arguments")
        return await self.tools.call(Call(self.session_id, call_id, function["name"], arguments))

    def _ending(self, result: CallResult) -> Termination | None:
        self.malformed += result.error in MALFORMED
        if result.error in _LOST:
            return "infra_error"
        if result.error == "env_error":
            return "env_error"
        if result.ended:
            return "ended" if result.error else "answered"
        return None

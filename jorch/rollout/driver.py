"""The rollout driver: one coroutine per trajectory, from a task to a `Trajectory`.

It turns sampled tokens into tool calls and tool results into tokens, and nothing else: batching is the sampler's work,
prices and verdicts are the tool server's. A bad rollout is data; only a dead server stops the run.
"""

import asyncio
import hashlib
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jorch.data.chat import ParsedCalls, parse_calls, render_observation, render_prompt, truncate_middle
from jorch.data.conversation import Conversation
from jorch.data.tokenizer import Tokenizer
from jorch.rollout.own_tokens import own_tokens
from jorch.rollout.sampler import Sampler
from jorch.rollout.tool_client import Call, OpenSession, SessionOpened, SessionRecord, ToolClient, ToolServerDown
from jorch.sections import ChatConfig, RolloutConfig
from jorch.types import (
    Completion,
    CompletionRequest,
    Task,
    Termination,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)

MALFORMED = frozenset({"unknown_tool", "invalid_arguments"})
"""Errors of the server that the model's own writing caused."""
_LOST = frozenset({"unknown_session", "session_over", "infra_error"})
"""Errors that say nothing about the policy: another attempt is made."""
_SELF_CONTAINED = frozenset({"experts"})
"""Environments whose tasks carry all messages and tools: the first turn is sampled while the session still opens."""


async def probe(tools: ToolClient, tasks: Sequence[Task]) -> None:
    """Open one session per environment and domain: a task that nobody can play stops a run before its first step.

    Raises ValueError where the server refuses it.
    """
    firsts: dict[tuple[str, str], Task] = {}
    for task in tasks:
        firsts.setdefault((task.environment, task.domain), task)
    for task in firsts.values():
        session_id = f"probe/{uuid.uuid4().hex}"
        await _accepted(task, _open(tools, task, session_id, seed=0))
        await tools.finish(session_id)


def all_lost(
    url: str, what: str, groups: Sequence[Sequence[Trajectory]], group_deadline_s: float | None
) -> ConnectionError:
    """Why a run cannot go on of whose trajectories none is left; `what` says which they were."""
    if any(t.termination == "deadline" for siblings in groups for t in siblings):
        return ConnectionError(
            f"no trajectory of {what} was done within rollout.group_deadline_s={group_deadline_s}: see what the tools "
            f"of {url} and the sampler wait for, or start a run that allows more"
        )
    return ToolServerDown(
        f"tool server {url} lost all sessions of {what}: it was restarted, or what its tools need is down"
    )


class SessionLost(Exception):
    """The tool server forgot a session, or what stands behind it failed: the attempt says nothing about the policy."""


@dataclass
class Driver:
    """Everything that the coroutines of a run share. Text is encoded and parsed once per distinct text."""

    sampler: Sampler
    tools: ToolClient
    tokenizer: Tokenizer
    chat: ChatConfig
    config: RolloutConfig
    _nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """A server that outlives this process must not take a resumed run's sessions for finished ones."""
    _prompts: dict[str, np.ndarray] = field(default_factory=dict)
    _observations: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)
    _parsed: dict[bytes, ParsedCalls] = field(default_factory=dict)

    async def run_groups(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        run_id: str,
        seed: int,
        temperature: float,
        first_position: int = 0,
    ) -> list[list[Trajectory]]:
        """`group_size` sibling trajectories for every task, in order.

        Args:
            run_id: tells this call from others of the run, e.g. "step-12".
            seed: of the sampling noise; each trajectory derives its own from it.
            first_position: of the first task, where other processes play those before it.

        Raises:
            ToolServerDown: the server is gone after all retries, or has lost every session.
            ValueError: the server refuses a task.
        """
        ids = [
            [f"{run_id}/{position}/{task.task_id}/{i}" for i in range(group_size)]
            for position, task in enumerate(tasks, first_position)
        ]
        self.announce(ids)
        try:
            async with self.sampler.connected(), asyncio.TaskGroup() as running:
                groups = [
                    running.create_task(self.run_group(task, siblings, seed, temperature))
                    for task, siblings in zip(tasks, ids, strict=True)
                ]
        except BaseExceptionGroup as failures:
            # Hundreds of trajectories fail of one cause: the first says it all.
            raise failures.exceptions[0] from None
        results = [group.result() for group in groups]
        if all(t.lost for siblings in results for t in siblings):
            raise all_lost(self.tools.url, run_id, results, self.config.group_deadline_s)
        return results

    def announce(self, ids: Sequence[Sequence[str]]) -> None:
        """Tell the sampler of the trajectories of groups that `run_group` is about to run."""
        for texts_of_earlier_groups in (self._prompts, self._observations, self._parsed):
            texts_of_earlier_groups.clear()
        self.sampler.expect(list(itertools.chain.from_iterable(ids)))

    async def run_group(
        self, task: Task, trajectory_ids: Sequence[str], seed: int, temperature: float
    ) -> list[Trajectory]:
        """The sibling trajectories of one task, in order.

        Those that are not done after `group_deadline_s` are named, given up, and end as "deadline". Raises as
        `run_groups`, but for a server that has lost every session.
        """
        siblings = [
            asyncio.create_task(self.run_task(task, trajectory_id, seed, temperature))
            for trajectory_id in trajectory_ids
        ]
        try:
            done, _ = await asyncio.wait(
                siblings, timeout=self.config.group_deadline_s, return_when=asyncio.FIRST_EXCEPTION
            )
            late = [trajectory_id for trajectory_id, s in zip(trajectory_ids, siblings, strict=True) if s not in done]
            for sibling in done:
                sibling.result()  # raises what it raised
        finally:
            for sibling in siblings:
                sibling.cancel()
            await asyncio.gather(*siblings, return_exceptions=True)
        if late:
            print(f"not done after {self.config.group_deadline_s:g} s, left out: {', '.join(late)}", flush=True)
        return [
            _lost(task, trajectory_id, "deadline") if trajectory_id in late else sibling.result()
            for trajectory_id, sibling in zip(trajectory_ids, siblings, strict=True)
        ]

    async def run_task(self, task: Task, trajectory_id: str, seed: int, temperature: float) -> Trajectory:
        """One trajectory; after an infrastructure failure a fresh attempt, as often as the config allows."""
        try:
            for attempt in range(self.config.trajectory_retries + 1):
                session_id = f"{self._nonce}/{trajectory_id}/{attempt}"
                try:
                    with self.tools.keep(session_id):
                        return await self._attempt(task, trajectory_id, session_id, seed, temperature)
                except SessionLost:
                    self.sampler.release(trajectory_id)
                    await self.tools.finish(session_id)  # the server counts the failure, and keeps no place for it
            return _lost(task, trajectory_id, "infra_error")
        finally:
            self.sampler.release(trajectory_id)

    async def _attempt(
        self, task: Task, trajectory_id: str, session_id: str, seed: int, temperature: float
    ) -> Trajectory:
        opening = _open(self.tools, task, session_id, seed)
        opened = None if task.environment in _SELF_CONTAINED else await _accepted(task, opening)
        conversation = self._conversation(task, opened) if self.chat.history == "template" else None
        token_ids = conversation.prompt_ids if conversation else self._prompt(task, opened)
        turns: list[Turn] = []
        malformed = 0
        termination: Termination = "max_turns"
        for number in range(self.config.max_turns):
            if len(token_ids) + self.config.max_tokens_per_turn > self.sampler.max_context_tokens:
                termination = "max_tokens"
                break
            noise = _derive_seed(seed, f"{trajectory_id}/{number}")
            completion = await self.sampler.complete(
                CompletionRequest(trajectory_id, token_ids, self.config.max_tokens_per_turn, temperature, noise)
            )
            await _accepted(task, opening)
            calls, results = await self._act(session_id, number, completion)
            turns.append(Turn(token_ids, completion, calls, results))
            malformed += sum(result.error in MALFORMED for result in results)
            ending = self._ending(completion, results, malformed)
            if ending:
                termination = ending
                break
            if conversation:
                token_ids = conversation.extend(completion.token_ids, _replies(calls, results))
            else:
                token_ids = np.concatenate([token_ids, completion.token_ids, self._observation(results)])
        await _accepted(task, opening)
        self.sampler.release(trajectory_id)  # before the verdict: the siblings' next turn need not wait for it
        record = await self.tools.finish(session_id)
        if record.error in _LOST:
            raise SessionLost
        if record.error:
            termination = "env_error"
        return self._trajectory(task, trajectory_id, turns, termination, malformed, record)

    async def _act(
        self, session_id: str, number: int, completion: Completion
    ) -> tuple[tuple[ToolCall, ...], tuple[ToolResult, ...]]:
        """Execute the calls of one completion in order. What does not parse is answered here, for free."""
        parsed = self._parse(completion)
        calls = parsed.calls
        if not calls and not parsed.errors:
            calls = (ToolCall("0", "", {"content": parsed.text}),)
        results: list[ToolResult] = []
        for call in calls:
            answer = await self.tools.call(Call(session_id, f"{number}.{call.call_id}", call.name, call.arguments))
            if answer.error in _LOST:
                raise SessionLost
            results.append(
                ToolResult(
                    call.call_id,
                    answer.tool,
                    answer.content,
                    answer.cost_usd,
                    answer.latency_s,
                    answer.error,
                    answer.ended,
                )
            )
            if answer.ended:
                break
        executed = calls[: len(results)]
        results += [
            ToolResult("", "", f"error: {line}", 0.0, 0.0, "invalid_arguments", False) for line in parsed.errors
        ]
        return executed, tuple(results)

    def _ending(self, completion: Completion, results: Sequence[ToolResult], malformed: int) -> Termination | None:
        """Why the trajectory ends after these results; None where it goes on."""
        for result in results:
            if result.error == "env_error":
                return "env_error"
            if result.ended:
                return "ended" if result.error else "answered"
        if malformed >= self.config.max_malformed_calls:
            return "invalid"
        return "max_tokens" if completion.finish_reason == "length" else None

    def _trajectory(
        self,
        task: Task,
        trajectory_id: str,
        turns: list[Turn],
        termination: Termination,
        malformed: int,
        record: SessionRecord,
    ) -> Trajectory:
        own, price = own_tokens(turns), self.config.orchestrator
        return Trajectory(
            task_id=task.task_id,
            trajectory_id=trajectory_id,
            turns=tuple(turns),
            termination=termination,
            outcome=record.outcome if termination in ("answered", "ended") else 0.0,
            num_malformed=malformed,
            cost_usd=record.cost_usd + own.cost_usd(price),
            latency_s=record.latency_s + own.latency_s(price),
            tool_counts=record.tool_counts,
        )

    def _conversation(self, task: Task, opened: SessionOpened | None) -> Conversation:
        return Conversation(*_said(task, opened), self.tokenizer, self.config.max_prompt_tokens)

    def _prompt(self, task: Task, opened: SessionOpened | None) -> np.ndarray:
        if task.task_id not in self._prompts:
            messages, tools = _said(task, opened)
            text = render_prompt(messages, tools, self.chat.style)
            ids = self.tokenizer.encode(text)
            self._prompts[task.task_id] = truncate_middle(ids, self.config.max_prompt_tokens)
        return self._prompts[task.task_id]

    def _parse(self, completion: Completion) -> ParsedCalls:
        key = completion.token_ids.tobytes()
        if key not in self._parsed:
            self._parsed[key] = parse_calls(self.tokenizer.decode(completion.token_ids))
        return self._parsed[key]

    def _observation(self, results: Sequence[ToolResult]) -> np.ndarray:
        contents = tuple(result.content for result in results)
        if contents not in self._observations:
            text = render_observation(contents, self.chat.style)
            self._observations[contents] = self.tokenizer.encode(text)
        return self._observations[contents]


def _said(task: Task, opened: SessionOpened | None) -> tuple[Sequence[dict], Sequence[dict]]:
    """The first messages and the tools, which some environments bring along."""
    return (opened and opened.messages) or task.messages, (opened and opened.tools) or task.tools


def _replies(calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> list[dict[str, str]]:
    """Results as messages. A call without a name is a message to the user, whose answer it gets."""
    to_user = [not call.name for call in calls] + [False] * (len(results) - len(calls))
    return [
        {"role": "user" if to_user and result.error is None else "tool", "content": result.content}
        for to_user, result in zip(to_user, results, strict=True)
    ]


def _lost(task: Task, trajectory_id: str, termination: Termination) -> Trajectory:
    return Trajectory(task.task_id, trajectory_id, (), termination, 0.0, 0, 0.0, 0.0, {})


def _derive_seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _open(tools: ToolClient, task: Task, session_id: str, seed: int) -> asyncio.Future[SessionOpened]:
    seed = _derive_seed(seed, task.task_id)
    return tools.open(OpenSession(session_id, task.environment, task.setup, seed, task.preference))


async def _accepted(task: Task, opening: asyncio.Future[SessionOpened]) -> SessionOpened:
    """The opened session; ValueError where the server refuses the task. May be awaited again."""
    opened = await opening
    if opened.error:
        raise ValueError(f"the tool server refused task {task.task_id}: {opened.error}")
    return opened

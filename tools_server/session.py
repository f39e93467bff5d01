"""A session in an environment: its calls in order, their answers and their bill; forked, taken back, judged once.

What can be answered at once is answered at once, without a task: that is the hot path of simulated experts.
The rest (environments whose calls block, or billed latency that is slept) runs as one task per call.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tools_server import registry
from tools_server.arguments import Check, compile_checks
from tools_server.config import ServerConfig
from tools_server.deadlines import Deadlines
from tools_server.environment import Branching, Environment, InfrastructureFailure, Observation
from tools_server.errors import Conflict, log, name_and_line, one_line
from tools_server.ledger import Ledger
from tools_server.wire import Call, CallResult, OpenSession, SessionOpened, SessionRecord
from tools_server.workers.environments import Origin, open_environment
from tools_server.workers.pool import Workers

T = TypeVar("T")
Answer = T | asyncio.Future[T]
History = Sequence[tuple[Call, CallResult]]


class Session:
    """One trajectory's world. Every public method may be repeated: the first answer stands."""

    def __init__(
        self,
        wanted: OpenSession,
        config: ServerConfig,
        workers: Workers,
        deadlines: Deadlines,
        origin: "tuple[Session, int] | None" = None,
    ) -> None:
        """`origin`: the session, and the number of its calls, after which this one goes on."""
        self.wanted = wanted
        self.last_used_s = time.monotonic()
        self.opened: Answer[SessionOpened]
        self.record: Answer[SessionRecord] | None = None
        self._config = config
        self._workers = workers
        self._deadlines = deadlines
        self._environment: Environment | None = None
        self._branching: Branching | None = None
        """The environment, where it is one that branches."""
        self._checks: Mapping[str, Check] = {}
        self._ledger = Ledger()
        self._answers: dict[str, tuple[Call, Answer[CallResult]]] = {}
        self._marks: dict[str, Any] = {}
        """Where a branching environment stood after each call that it saw."""
        self._start: Any = None
        """Where it stood before all of them."""
        self._in_order = asyncio.Lock()  # fair: waiters go in the order in which they came
        self._over = False
        self._error: str | None = None
        kind = registry.imported(wanted.environment)
        self._blocking = kind is None or kind.blocking  # an import blocks too
        self.opened = asyncio.create_task(self._open_off_loop(origin)) if self._blocking else self._open(origin)

    @property
    def busy(self) -> bool:
        """Whether a task of this session is under way."""
        answers = (self.opened, *(answer for _, answer in self._answers.values()))
        return self._in_order.locked() or any(isinstance(a, asyncio.Future) and not a.done() for a in answers)

    @property
    def _immediate(self) -> bool:
        return not self._blocking and self._config.time_scale == 0 and not self._in_order.locked()

    def call(self, call: Call) -> Answer[CallResult]:
        """Raises Conflict where another call had this call_id."""
        known = self._answers.get(call.call_id)
        if known is not None:
            if known[0] != call:
                raise Conflict(
                    f"session {call.session_id!r}: call_id {call.call_id!r} was used before with another "
                    "name or arguments; session ids must be unique per trajectory, call ids within a session"
                )
            return known[1]
        self.last_used_s = time.monotonic()
        if self._immediate:
            answer = self._book(call, self._observe(call, self._environment))
        else:
            answer = asyncio.create_task(self._call_in_order(call))
        self._answers[call.call_id] = (call, answer)
        return answer

    def finish(self) -> Answer[SessionRecord]:
        if self.record is None:
            self.record = self._judge() if self._immediate else asyncio.create_task(self._finish_in_order())
        return self.record

    def history(self) -> list[tuple[Call, CallResult]]:
        """The calls that have their result, in the order in which they were asked for."""
        return [
            (call, answer.result() if isinstance(answer, asyncio.Future) else answer)
            for call, answer in self._answers.values()
            if not isinstance(answer, asyncio.Future) or answer.done()
        ]

    def fork(self, wanted: OpenSession, num_calls: int) -> "Session":
        """A session that goes on after this one's first `num_calls` calls."""
        return Session(wanted, self._config, self._workers, self._deadlines, (self, num_calls))

    async def restore(self, num_calls: int) -> None:
        """Take back all calls but the first `num_calls`, with their bill. Raises Conflict where that cannot be."""
        async with self._in_order:
            environment = await self._off_loop(self._world_after, num_calls)
            history = self.history()[:num_calls]
            self._answers, self._ledger, self._over, self._error = {}, Ledger(), False, None
            self._adopt(history)
            self._set_environment(environment)

    async def state(self) -> str:
        """A digest of the world, where the environment keeps one. Raises Conflict where it has failed."""
        try:
            return "" if self._branching is None else await self._off_loop(self._branching.state)
        except InfrastructureFailure as failure:
            raise Conflict(one_line(failure)) from None

    def cancel(self) -> None:
        """End the calls under way."""
        for _, answer in self._answers.values():
            if isinstance(answer, asyncio.Future):
                self._deadlines.cut(answer)

    def _open(self, origin: "tuple[Session, int] | None") -> SessionOpened:
        try:
            kind = registry.environment_class(self.wanted.environment)
            if origin is None:
                environment = self._build()
            else:
                source, num_calls = origin
                environment = source._world_after(num_calls)
                self._start, self._marks = source._start, dict(source._marks)
                self._adopt(source.history()[:num_calls])
            self._checks = compile_checks(environment.tools) if environment.tools else {}
        except (ValueError, InfrastructureFailure) as error:
            return SessionOpened(self.wanted.session_id, error=one_line(error))
        except Exception as error:
            log.exception("an environment cannot be built", extra={"session": self.wanted.session_id})
            return SessionOpened(self.wanted.session_id, error=f"env_error: {name_and_line(error)}")
        self._blocking = kind.blocking
        self._set_environment(environment)
        if origin is None and self._branching is not None:
            self._start = self._branching.mark()
        return SessionOpened(self.wanted.session_id, environment.tools, environment.messages)

    def _build(self) -> Environment:
        """A world as the set-up has it; in a process of its own kind, where its calls block."""
        kind, wanted = registry.environment_class(self.wanted.environment), self.wanted
        if not kind.blocking:
            return kind(wanted.setup, wanted.seed, self._config)
        return open_environment(self._workers, Origin(wanted.environment, wanted.setup, wanted.seed), kind)

    def _set_environment(self, environment: Environment) -> None:
        self._environment = environment
        self._branching = environment if isinstance(environment, Branching) else None

    def _world_after(self, num_calls: int) -> Environment:
        """A world of its own, as it was after the first `num_calls` calls: branched off, or played again.

        Raises Conflict where a call is answered otherwise when it is played again.
        """
        history = self.history()[:num_calls]
        if self._error is not None:
            raise Conflict("its environment has failed")
        if self._branching is not None:
            marks = [self._marks[call.call_id] for call, _ in history if call.call_id in self._marks]
            return self._branching.branch(marks[-1] if marks else self._start)
        environment = self._build()
        for call, result in history:
            if result.error in ("session_over", "cancelled"):
                continue
            if CallResult(call.session_id, call.call_id, *self._observe(call, environment)) != result:
                raise Conflict(f"call {call.call_id!r} is answered otherwise when it is repeated")
        return environment

    def _adopt(self, history: History) -> None:
        """Take over calls with their bill."""
        for call, result in history:
            own = replace(result, session_id=self.wanted.session_id)
            self._answers[call.call_id] = (replace(call, session_id=own.session_id), own)
            self._ledger.charge(own)
            self._over = self._over or own.ended

    def _observe(self, call: Call, environment: Environment | None) -> Observation:
        """What the environment says to `call`, or why it never sees it."""
        if environment is None:
            return Observation(call.name, "the session was refused", error="unknown_session", ended=True)
        if environment is self._environment and self._over:
            return Observation(call.name, "the session is over", error="session_over", ended=True)
        refusal = self._refusal(call) if self._checks else None
        if refusal is not None:
            return refusal
        try:
            return environment.call(call.name, call.arguments)
        except InfrastructureFailure as failure:
            return Observation(call.name, one_line(failure), error="infra_error", ended=True)
        except Exception as error:
            log.exception("an environment failed", extra={"session": call.session_id, "tool": call.name})
            content = f"the environment failed: {type(error).__name__}"
            return Observation(call.name, content, error="env_error", ended=True)

    def _refusal(self, call: Call) -> Observation | None:
        if not call.name:
            if isinstance(call.arguments.get("content"), str):
                return None
            return Observation("", "$.content: a message is a string", error="invalid_arguments")
        check = self._checks.get(call.name)
        if check is None:
            content = f"unknown tool; allowed: {', '.join(self._checks)}"
            return Observation(call.name, content, error="unknown_tool")
        mistake = check(call.arguments)
        return Observation(call.name, mistake, error="invalid_arguments") if mistake else None

    def _book(self, call: Call, observation: Observation) -> CallResult:
        self._ledger.charge(observation)
        self._over = self._over or observation.ended
        if observation.error in ("env_error", "infra_error"):
            self._error = observation.error
        if self._branching is not None and observation.error != "cancelled":
            self._marks[call.call_id] = self._branching.mark()
        return CallResult(call.session_id, call.call_id, *observation)

    def _judge(self) -> SessionRecord:
        outcome = 0.0
        if self._error is None and self._environment is not None:
            try:
                outcome = float(self._environment.outcome())
            except InfrastructureFailure as failure:
                log.warning("no verdict: %s", one_line(failure), extra={"session": self.wanted.session_id})
                self._error = "infra_error"
            except Exception:
                log.exception("an environment failed to judge", extra={"session": self.wanted.session_id})
                self._error = "env_error"
        self._over = True
        bill, name = self._ledger, self.wanted.session_id
        sums = bill.cost_usd, bill.latency_s, bill.tool_counts
        return SessionRecord(name, outcome, *sums, self._error, preference=self.wanted.preference)

    async def _open_off_loop(self, origin: "tuple[Session, int] | None") -> SessionOpened:
        async with self._in_order:
            if origin is None:
                return await self._off_loop(self._open, None)
            async with origin[0]._in_order:  # its world holds still while it is copied
                return await self._off_loop(self._open, origin)

    async def _call_in_order(self, call: Call) -> CallResult:
        """A call that is cut in the queue is only cancelled; when the environment is at it already, nobody knows the
        world that it leaves, so that the session ends without a verdict.
        """
        observation = Observation(call.name, "cancelled before its turn", error="cancelled")
        try:
            async with self._deadlines.limit(call.deadline_s), self._in_order:
                observation = Observation(call.name, "cancelled half-way", error="infra_error", ended=True)
                observation = await self._off_loop(self._observe, call, self._environment)
                await asyncio.sleep(observation.latency_s * self._config.time_scale)
        except TimeoutError:
            pass
        self.last_used_s = time.monotonic()
        return self._book(call, observation)

    async def _finish_in_order(self) -> SessionRecord:
        async with self._in_order:
            return await self._off_loop(self._judge)

    async def _off_loop(self, function: Callable[..., T], *args: Any) -> T:
        if not self._blocking:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._workers.threads, function, *args)

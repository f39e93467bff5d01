"""Sessions: one environment and its bill per trajectory; opened, called in order, finished exactly once.

What can be answered at once is answered at once, without a task: that is the hot path of simulated experts.
The rest (environments whose calls block, or billed latency that is slept) runs as one task per call, in
order within a session and side by side across sessions. A method of `Sessions` returns the answer or the
task that will have it.
"""

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from tools_server import registry
from tools_server.arguments import Check, compile_checks
from tools_server.config import ServerConfig
from tools_server.environment import Environment, InfrastructureFailure, Observation
from tools_server.errors import BadRequest, log, name_and_line, one_line
from tools_server.judge import Verifiers
from tools_server.ledger import Ledger
from tools_server.metrics import Metrics
from tools_server.tool_session import ToolSession
from tools_server.toolbox import Toolbox
from tools_server.trace import Trace, TraceFile
from tools_server.wire import Call, CallResult, ForkSession, OpenSession, SessionOpened, SessionRecord

T = TypeVar("T")
Answer = T | asyncio.Future[T]


def _then(answer: Answer[T], action: Callable[[T], None]) -> Answer[T]:
    """`answer`, with `action` done on it now or when it is there."""
    if isinstance(answer, asyncio.Future):
        answer.add_done_callback(lambda task: task.cancelled() or action(task.result()))
    else:
        action(answer)
    return answer


async def _awaited(answer: Answer[T]) -> T:
    found: Any = answer
    return await found if isinstance(found, asyncio.Future) else found


class Session:
    """One trajectory's world. Every public method may be repeated: the first answer stands."""

    def __init__(self, wanted: OpenSession, config: ServerConfig, executor: ThreadPoolExecutor) -> None:
        self.wanted = wanted
        self.last_used_s = time.monotonic()
        self.opened: Answer[SessionOpened]
        self.record: Answer[SessionRecord] | None = None
        self._config = config
        self._executor = executor
        self._environment: Environment | None = None
        self._checks: Mapping[str, Check] = {}
        self._ledger = Ledger()
        self._answers: dict[str, tuple[Call, Answer[CallResult]]] = {}
        self._in_order = asyncio.Lock()  # fair: waiters go in the order in which they came
        self._over = False
        self._error: str | None = None
        kind = registry.imported(wanted.environment)
        self._blocking = kind is None or kind.blocking  # an import blocks too
        self.opened = asyncio.create_task(self._open_off_loop()) if self._blocking else self._open()

    @property
    def busy(self) -> bool:
        """Whether a task of this session is under way."""
        return self._in_order.locked() or (isinstance(self.opened, asyncio.Future) and not self.opened.done())

    @property
    def _immediate(self) -> bool:
        return not self._blocking and self._config.time_scale == 0 and not self._in_order.locked()

    def call(self, call: Call) -> Answer[CallResult]:
        """Raises BadRequest where another call had this call_id."""
        known = self._answers.get(call.call_id)
        if known is not None:
            if known[0] != call:
                raise BadRequest(
                    f"session {call.session_id!r}: call_id {call.call_id!r} was used before with another "
                    "name or arguments; session ids must be unique per trajectory, call ids within a session"
                )
            return known[1]
        self.last_used_s = time.monotonic()
        if self._immediate:
            answer = self._book(call, self._observe(call))
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

    def _open(self) -> SessionOpened:
        try:
            kind = registry.environment_class(self.wanted.environment)
            environment = kind(self.wanted.setup, self.wanted.seed, self._config)
            self._checks = compile_checks(environment.tools) if environment.tools else {}
        except (ValueError, InfrastructureFailure) as error:
            return SessionOpened(self.wanted.session_id, error=one_line(error))
        except Exception as error:
            log.exception("session %s: its environment cannot be built", self.wanted.session_id)
            return SessionOpened(self.wanted.session_id, error=f"env_error: {name_and_line(error)}")
        self._blocking = kind.blocking
        self._environment = environment
        return SessionOpened(self.wanted.session_id, environment.tools, environment.messages)

    def _observe(self, call: Call) -> Observation:
        """What the environment says to `call`, or why it never sees it."""
        environment = self._environment
        if environment is None:
            return Observation(call.name, "the session was refused", error="unknown_session", ended=True)
        if self._over:
            return Observation(call.name, "the session is over", error="session_over", ended=True)
        refusal = self._refusal(call) if self._checks else None
        if refusal is not None:
            return refusal
        try:
            return environment.call(call.name, call.arguments)
        except InfrastructureFailure as failure:
            self._error = "infra_error"
            return Observation(call.name, one_line(failure), error="infra_error", ended=True)
        except Exception as error:
            log.exception("session %s: its environment failed on %s", call.session_id, call.name)
            self._error = "env_error"
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
        return CallResult(call.session_id, call.call_id, *observation)

    def _judge(self) -> SessionRecord:
        outcome = 0.0
        if self._error is None and self._environment is not None:
            try:
                outcome = float(self._environment.outcome())
            except InfrastructureFailure as failure:
                log.warning("session %s: %s", self.wanted.session_id, one_line(failure))
                self._error = "infra_error"
            except Exception:
                log.exception("session %s: its environment failed to judge", self.wanted.session_id)
                self._error = "env_error"
        self._over = True
        bill = self._ledger
        return SessionRecord(
            self.wanted.session_id, outcome, bill.cost_usd, bill.latency_s, bill.tool_counts, self._error
        )

    async def _open_off_loop(self) -> SessionOpened:
        async with self._in_order:
            return await self._off_loop(self._open)

    async def _call_in_order(self, call: Call) -> CallResult:
        async with self._in_order:
            observation = await self._off_loop(self._observe, call)
            result = self._book(call, observation)
            await asyncio.sleep(observation.latency_s * self._config.time_scale)
            self.last_used_s = time.monotonic()
            return result

    async def _finish_in_order(self) -> SessionRecord:
        async with self._in_order:
            return await self._off_loop(self._judge)

    async def _off_loop(self, function: Callable[..., T], *args: Any) -> T:
        if not self._blocking:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


class Sessions:
    """All sessions of a server: at most `max_sessions` open ones, and as many records of finished ones."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ValueError where the config names a price that is not to be had."""
        self._config = config
        self.metrics = Metrics(self.__len__)
        self.toolbox = Toolbox(config, self.metrics)
        self._traces = TraceFile(config.traces) if config.traces is not None else None
        self.draining = False
        self.verifiers = Verifiers(self.toolbox, self.metrics)
        self._executor = ThreadPoolExecutor(config.worker_threads, thread_name_prefix="environment")
        self._sessions: dict[str, Session | ToolSession] = {}
        self._records: OrderedDict[str, tuple[float, SessionRecord]] = OrderedDict()

    def __len__(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def open(self, wanted: OpenSession) -> Answer[SessionOpened]:
        """A refusal is an answer with `error` set."""
        name = wanted.session_id
        session = self._sessions.get(name)
        if session is not None:
            if session.wanted != wanted:
                return SessionOpened(name, error=f"session {name!r} is open with another setup, environment or seed")
            return session.opened
        if name in self._records:
            return SessionOpened(name, error=f"session {name!r} is finished; choose another session_id")
        if self.draining:
            return SessionOpened(name, error="the server is stopping; open the session on another one")
        if len(self._sessions) >= self._config.max_sessions and not self.forget_idle():
            return SessionOpened(
                name,
                error=f"{len(self)} sessions are open, all that max_sessions allows; finish some or raise it",
            )
        if wanted.environment == registry.TOOLS:
            session = ToolSession(wanted, self.toolbox, self.verifiers)
        else:
            session = Session(wanted, self._config, self._executor)
        self._sessions[name] = session
        return _then(session.opened, self._drop_refused)

    def call(self, call: Call) -> Answer[CallResult]:
        """Raises BadRequest where another call of its session had this call_id."""
        session = self._sessions.get(call.session_id)
        if session is not None:
            return session.call(call)
        over = call.session_id in self._records
        error, content = ("session_over", "is over") if over else ("unknown_session", "is unknown here")
        return CallResult(
            call.session_id, call.call_id, call.name, f"the session {content}", 0.0, 0.0, error, ended=True
        )

    def fork(self, fork: ForkSession) -> Answer[SessionOpened]:
        """A refusal is an answer with `error` set."""
        source = self._sessions.get(fork.session_id)
        if source is None:
            return SessionOpened(fork.new_session_id, error=f"session {fork.session_id!r} is not open here")
        if fork.new_session_id in self._sessions:
            return self._sessions[fork.new_session_id].opened
        if source.busy:
            return SessionOpened(fork.new_session_id, error=f"session {fork.session_id!r} has calls under way")
        history = source.history()
        num_calls = len(history) if fork.num_calls == -1 else fork.num_calls
        if not 0 <= num_calls <= len(history):
            line = f"num_calls: got {num_calls}, session {fork.session_id!r} has {len(history)} calls"
            return SessionOpened(fork.new_session_id, error=line)
        return asyncio.create_task(self._fork(source.wanted, history[:num_calls], fork.new_session_id))

    async def _fork(
        self, wanted: OpenSession, history: list[tuple[Call, CallResult]], new_session_id: str
    ) -> SessionOpened:
        """A deterministic environment plays the calls again; tools outside are not asked twice."""
        opened = await _awaited(self.open(replace(wanted, session_id=new_session_id)))
        if opened.error is not None:
            return opened
        session = self._sessions[new_session_id]
        error = session.adopt(history) if isinstance(session, ToolSession) else None
        for call, result in history if isinstance(session, Session) else ():
            again = await _awaited(session.call(replace(call, session_id=new_session_id)))
            if again != replace(result, session_id=new_session_id):
                error = f"call {call.call_id!r} is answered otherwise when it is repeated"
                break
        if error is not None:
            del self._sessions[new_session_id]
            return SessionOpened(new_session_id, error=error)
        return opened

    def finish(self, session_id: str) -> Answer[SessionRecord]:
        """The verdict; of a session that is not known here, a record with error "unknown_session"."""
        session = self._sessions.get(session_id)
        if session is None:
            stored = self._records.get(session_id)
            return stored[1] if stored else SessionRecord(session_id, 0.0, 0.0, 0.0, {}, "unknown_session")
        return _then(session.finish(), functools.partial(self._store, session))

    def unready(self) -> str | None:
        """Why no session should come here now, or None."""
        if self.draining:
            return "the server is stopping"
        if self._traces is not None and self._traces.failed:
            return "traces cannot be written"
        if self.toolbox.recorder is not None and self.toolbox.recorder.failed:
            return "recordings cannot be written"
        return None

    def forget_idle(self) -> int:
        """Forget what nobody has used for `session_ttl_s`; the number of open sessions forgotten."""
        oldest_s = time.monotonic() - self._config.session_ttl_s
        idle = [n for n, session in self._sessions.items() if session.last_used_s < oldest_s and not session.busy]
        for name in idle:
            del self._sessions[name]
        while self._records and next(iter(self._records.values()))[0] < oldest_s:
            self._records.popitem(last=False)
        if idle:
            log.warning(
                "forgot %d sessions idle for %g s, the first %s",
                len(idle),
                self._config.session_ttl_s,
                idle[0],
            )
        return len(idle)

    async def close(self) -> None:
        """Start no further blocking work, and end the tools."""
        await self.toolbox.close()
        if self._traces is not None:
            self._traces.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _drop_refused(self, opened: SessionOpened) -> None:
        if opened.error is not None:
            self._sessions.pop(opened.session_id, None)

    def _store(self, session: "Session | ToolSession", record: SessionRecord) -> None:
        if self._sessions.pop(record.session_id, None) is None:
            return  # a repeated request: stored already
        environment = session.wanted.environment
        for _, result in (history := session.history()):
            self.metrics.count_call(environment, result.error)
        self.metrics.count_finished(environment, record.error)
        if self._traces is not None:
            self._traces.write(Trace(session.wanted, history, record))
        self._records.setdefault(record.session_id, (time.monotonic(), record))
        if len(self._records) > self._config.max_sessions:
            self._records.popitem(last=False)

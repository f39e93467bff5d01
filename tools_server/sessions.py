"""All sessions of a server: opened, called, forked, finished exactly once, and forgotten when nobody uses them.

A method of `Sessions` returns the answer, or the task that will have it where it cannot be had at once.
"""

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from tools_server import registry
from tools_server.config import ServerConfig
from tools_server.deadlines import Deadlines
from tools_server.errors import Busy, Conflict, UnknownSession, log, one_line
from tools_server.judge import Verifiers
from tools_server.metrics import Metrics
from tools_server.session import Answer, Session
from tools_server.spans import Spans
from tools_server.tool_session import ToolSession
from tools_server.toolbox import Toolbox
from tools_server.trace import Trace, TraceFile
from tools_server.wire import Call, CallResult, ForkSession, OpenSession, SessionOpened, SessionRecord, Snapshot
from tools_server.workers.pool import Workers

T = TypeVar("T")


def _then(answer: Answer[T], action: Callable[[T], None]) -> Answer[T]:
    """`answer`, with `action` done on it now or when it is there."""
    if isinstance(answer, asyncio.Future):
        answer.add_done_callback(lambda task: task.cancelled() or action(task.result()))
    else:
        action(answer)
    return answer


class Sessions:
    """All sessions of a server: at most `max_sessions` open ones, and as many records of finished ones."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ValueError where the config names a price that is not to be had, or a package is missing."""
        self._config = config
        self.deadlines = Deadlines(config.abandon_s)
        self.metrics = Metrics(self.__len__, self.deadlines.__len__)
        self.spans = Spans(config.spans_url)
        self.toolbox = Toolbox(config, self.metrics, self.spans)
        self._traces = TraceFile(config.traces) if config.traces is not None else None
        self.draining = False
        self.verifiers = Verifiers(self.toolbox, self.metrics)
        self.workers = Workers(config, self.metrics.count_lost_worker)
        self._sessions: dict[str, Session | ToolSession] = {}
        self._records: OrderedDict[str, tuple[float, SessionRecord]] = OrderedDict()

    def __len__(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def admit_sessions(self, names: Iterable[str]) -> None:
        """Raises Busy where so many more may not be open."""
        most = self._config.max_sessions
        new = {name for name in names if name not in self._sessions and name not in self._records}
        if new and len(self) + len(new) > most and len(self) - self.forget_idle() + len(new) > most:
            self.metrics.count_refused("max_sessions")
            raise Busy(f"{len(self)} sessions are open, {len(new)} more were asked for, max_sessions is {most}")

    def admit_calls(self, count: int) -> None:
        """Raises Busy where so many more may not be under way."""
        if len(self.deadlines) and len(self.deadlines) + count > self._config.max_calls:
            self.metrics.count_refused("max_calls")
            raise Busy(f"{len(self.deadlines)} calls are under way, max_calls is {self._config.max_calls}")

    def open(self, wanted: OpenSession) -> Answer[SessionOpened]:
        """A refusal is an answer with `error` set."""
        name = wanted.session_id
        session = self._sessions.get(name)
        if session is not None:
            if session.wanted != wanted:
                differs = "another environment, setup, seed or preference"
                return SessionOpened(name, error=f"session {name!r} is open with {differs}")
            return session.opened
        if name in self._records:
            return SessionOpened(name, error=f"session {name!r} is finished; choose another session_id")
        if self.draining:
            return SessionOpened(name, error="the server is stopping; open the session on another one")
        if wanted.environment == registry.TOOLS:
            session = ToolSession(wanted, self.toolbox, self.verifiers, self.deadlines)
        else:
            session = Session(wanted, self._config, self.workers, self.deadlines)
        self._sessions[name] = session
        return _then(session.opened, self._drop_refused)

    def call(self, call: Call) -> Answer[CallResult]:
        """Raises Conflict where another call of its session had this call_id."""
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
        name = fork.new_session_id
        if name in self._sessions:
            return self._sessions[name].opened
        if source is None or name in self._records or self.draining:
            reason = f"session {fork.session_id!r} is not open here"
            if source is not None:
                reason = "the server is stopping" if self.draining else f"session {name!r} is finished"
            return SessionOpened(name, error=reason)
        try:
            num_calls = self._checked_calls(source, fork.num_calls)
            session = source.fork(replace(source.wanted, session_id=name), num_calls)
        except Conflict as error:
            return SessionOpened(name, error=one_line(error))
        self._sessions[name] = session
        return _then(session.opened, self._drop_refused)

    async def snapshot(self, session_id: str) -> Snapshot:
        """Where the session stands; renews its lease. Raises UnknownSession, and Conflict while calls are under way."""
        session = self._known(session_id)
        session.last_used_s = time.monotonic()
        return Snapshot(session_id, self._checked_calls(session, -1), await session.state())

    def renew(self, session_id: str) -> Snapshot:
        """Begin the session's lease anew. Raises UnknownSession."""
        session = self._known(session_id)
        session.last_used_s = time.monotonic()
        return Snapshot(session_id, len(session.history()))

    def renew_if_open(self, session_id: str) -> bool:
        """The same of a session that may be gone; whether it is open here."""
        if session_id in self._sessions:
            self._sessions[session_id].last_used_s = time.monotonic()
        return session_id in self._sessions

    async def restore(self, session_id: str, num_calls: int) -> Snapshot:
        """Take back all calls but the first `num_calls`. Raises UnknownSession, and Conflict where that cannot be."""
        session = self._known(session_id)
        if session.record is not None:
            raise Conflict(f"session {session_id!r} is being judged")
        await session.restore(self._checked_calls(session, num_calls))
        return await self.snapshot(session_id)

    def delete(self, session_id: str) -> bool:
        """Forget a session and its record, and end its calls; whether there was one."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.cancel()
        return self._records.pop(session_id, None) is not None or session is not None

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
        await self.spans.close()
        if self._traces is not None:
            self._traces.close()
        self.workers.close()

    def _known(self, session_id: str) -> Session | ToolSession:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession(f"session {session_id!r} is not open here")
        return session

    def _checked_calls(self, session: Session | ToolSession, num_calls: int) -> int:
        """`num_calls`, -1 meaning all. Raises Conflict where there are not as many, or some are under way."""
        name = session.wanted.session_id
        if session.busy:
            raise Conflict(f"session {name!r} has calls under way")
        there = len(session.history())
        if not -1 <= num_calls <= there:
            raise Conflict(f"num_calls: got {num_calls}, session {name!r} has {there} calls")
        return there if num_calls == -1 else num_calls

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

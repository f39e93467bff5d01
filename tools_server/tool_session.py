"""A session of the environment `tools`: a task that is solved with the server's configured tools.

Calls that only read run side by side; one that writes waits for all before it, and all after it wait for it. The final
answer is a message to the user; a verifier judges it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, ValidationError

from tools_server.config import Section
from tools_server.deadlines import Deadlines
from tools_server.environment import Observation
from tools_server.errors import UNBILLED, Conflict, log
from tools_server.judge import Verifiers
from tools_server.ledger import Ledger
from tools_server.tool import CallContext, Price, billed_s, billed_usd
from tools_server.toolbox import Toolbox
from tools_server.tools.simulated import Simulation, check_simulation
from tools_server.verifiers import Verdict, Verifier
from tools_server.wire import Call, CallResult, OpenSession, SessionOpened, SessionRecord

Verify = Callable[[Any, str, str], Awaitable[Verdict]]
"""(verifier, question, answer) -> verdict."""
CANCELLED = Observation("", "cancelled", error="cancelled")
CUT = Observation("", "cancelled half-way", error="infra_error", ended=True)


class SessionPrice(Section):
    """What one tool costs in one session, in place of the server's price."""

    usd_per_call: float = Field(0.0, ge=0)
    usd_per_second: float = Field(0.0, ge=0)
    usd_per_million_input_tokens: float = Field(0.0, ge=0)
    usd_per_million_cached_tokens: float = Field(0.0, ge=0)
    usd_per_million_output_tokens: float = Field(0.0, ge=0)

    def price(self) -> Price:
        return Price(
            self.usd_per_call,
            self.usd_per_second,
            self.usd_per_million_input_tokens / 1e6,
            self.usd_per_million_output_tokens / 1e6,
            self.usd_per_million_cached_tokens / 1e6,
        )


class Budget(Section):
    """What a session may use. A call that comes when one of them is spent is refused, and costs nothing."""

    usd: float | None = Field(None, ge=0)
    seconds: float | None = Field(None, ge=0, description="billed")
    calls: int | None = Field(None, ge=0)


class ToolsSetup(Section):
    """`OpenSession.setup` of the environment `tools`.

    Example: {"question": "Capital of Chile?", "tools": ["search"],
              "verifier": {"kind": "exact", "answers": ["Santiago"]}}
    """

    question: str | None = Field(None, description="the user's first message; None: the task carries it")
    system: str | None = None
    tools: tuple[str, ...] | None = Field(None, description="names that may be called; None = all")
    prices: dict[str, SessionPrice] = Field({}, description="by tool")
    budget: Budget = Field(default_factory=lambda: Budget.model_validate({}))
    verifier: Verifier | None = Field(None, description="None: any final answer counts as right")
    depth: int = Field(0, ge=0, description="orchestrators above this one")
    simulation: Simulation | None = Field(None, description="what simulated experts know of the task")
    clock: datetime | None = Field(None, description="UTC, and it stands still: what Python programs take for now")

    @property
    def clock_s(self) -> float | None:
        clock = self.clock
        return None if clock is None else (clock if clock.tzinfo else clock.replace(tzinfo=UTC)).timestamp()


class ToolSession:
    """One trajectory. Like `sessions.Session`, every public method may be repeated: the first answer stands."""

    def __init__(self, wanted: OpenSession, toolbox: Toolbox, verifiers: Verifiers, deadlines: Deadlines) -> None:
        self.wanted = wanted
        self.last_used_s = time.monotonic()
        self.record: SessionRecord | asyncio.Task[SessionRecord] | None = None
        self._toolbox = toolbox
        self._verifiers = verifiers
        self._deadlines = deadlines
        self._setup = ToolsSetup.model_validate({})
        self._names: tuple[str, ...] = ()
        self._prices: Mapping[str, Price] = {}
        self._ledger = Ledger()
        self._num_calls = 0
        self._answers: dict[str, tuple[Call, asyncio.Future[CallResult]]] = {}
        self._pending: dict[str, tuple[asyncio.Task[CallResult], bool]] = {}
        """Calls under way by id, and whether they write; in the order in which they came."""
        self._over = False
        self.opened = self._open()

    @property
    def busy(self) -> bool:
        judging = isinstance(self.record, asyncio.Task) and not self.record.done()
        return bool(self._pending) or judging

    def call(self, call: Call) -> asyncio.Future[CallResult]:
        """Raises Conflict where another call had this call_id."""
        self.last_used_s = time.monotonic()
        known = self._answers.get(call.call_id)
        if known is not None:
            if known[0] != call:
                raise Conflict(
                    f"session {call.session_id!r}: call_id {call.call_id!r} was used before "
                    "with another name or arguments"
                )
            return known[1]
        writes = call.name == "" or (call.name in self._names and self._writes(call))
        before = [task for task, writing in self._pending.values() if writes or writing]
        answer = asyncio.create_task(self._answer_call(call, before))
        self._pending[call.call_id] = (answer, writes)
        self._answers[call.call_id] = (call, answer)
        return answer

    def finish(self) -> asyncio.Task[SessionRecord] | SessionRecord:
        if self.record is None:
            pending = [task for task, _ in self._pending.values()]
            self.record = asyncio.create_task(self._judge(pending))
        return self.record

    def history(self) -> list[tuple[Call, CallResult]]:
        """The calls that have their result, in the order in which they were asked for."""
        return [(call, answer.result()) for call, answer in self._answers.values() if answer.done()]

    def fork(self, wanted: OpenSession, num_calls: int) -> "ToolSession":
        """A session that goes on after this one's first `num_calls` calls, which are not made again.

        Raises Conflict where one of them wrote: no fork can copy the world outside.
        """
        history = self.history()[:num_calls]
        self._refuse_writes(history, "cannot be forked")
        forked = ToolSession(wanted, self._toolbox, self._verifiers, self._deadlines)
        forked._adopt(history)
        return forked

    async def restore(self, num_calls: int) -> None:
        """Take back all calls but the first `num_calls`, with their bill. Raises Conflict where one of them wrote."""
        history = self.history()
        self._refuse_writes(history[num_calls:], "cannot take that back")
        self._answers, self._ledger, self._num_calls, self._over = {}, Ledger(), 0, False
        self._adopt(history[:num_calls])

    async def state(self) -> str:
        """The tools' world lies outside."""
        return ""

    def cancel(self) -> None:
        """End the calls under way."""
        for task, _ in list(self._pending.values()):
            self._deadlines.cut(task)

    def _writes(self, call: Call) -> bool:
        tool = self._toolbox.tools.get(call.name)
        return tool is not None and tool.spec.side_effect == "write"

    def _refuse_writes(self, history: Sequence[tuple[Call, CallResult]], consequence: str) -> None:
        for call, result in history:
            unmade = result.error in UNBILLED and result.error != "infra_error"
            if self._writes(call) and not unmade:
                raise Conflict(f"a session that called {call.name!r}, which writes, {consequence}")

    def _adopt(self, history: Sequence[tuple[Call, CallResult]]) -> None:
        """Take over calls with their bill."""
        for call, result in history:
            own = replace(result, session_id=self.wanted.session_id)
            answer: asyncio.Future[CallResult] = asyncio.get_running_loop().create_future()
            answer.set_result(own)
            self._answers[call.call_id] = (replace(call, session_id=own.session_id), answer)
            self._ledger.charge(own)
            self._num_calls += bool(call.name) and own.error not in UNBILLED
            self._over = self._over or own.ended

    def _open(self) -> SessionOpened:
        name = self.wanted.session_id
        try:
            self._setup = setup = ToolsSetup.model_validate(self.wanted.setup)
            self._names = tuple(self._toolbox.tools) if setup.tools is None else setup.tools
            for tool in (*self._names, *setup.prices):
                if tool not in self._toolbox.tools:
                    raise ValueError(
                        f"setup: unknown tool {tool!r}; this server has {', '.join(self._toolbox.tools) or 'none'}"
                    )
            self._verifiers.check(setup.verifier)
            check_simulation(setup.simulation, (self._toolbox.tools[tool] for tool in self._names))
        except ValidationError as error:
            first = error.errors()[0]
            return SessionOpened(name, error=f"setup.{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except ValueError as error:
            return SessionOpened(name, error=str(error))
        specs = {tool: self._toolbox.tools[tool].spec for tool in self._names}
        self._prices = {tool: spec.price for tool, spec in specs.items()}
        self._prices |= {tool: price.price() for tool, price in setup.prices.items()}
        messages = [
            {"role": role, "content": text}
            for role, text in (("system", setup.system), ("user", setup.question))
            if text is not None
        ]
        return SessionOpened(name, [spec.openai for spec in specs.values()], messages)

    async def _answer_call(self, call: Call, before: list[asyncio.Task[CallResult]]) -> CallResult:
        """A call that is cut while it waits is only cancelled, and so is one that reads. Nobody knows what one that
        writes has written by then, so that the session ends without a verdict.
        """
        observation = CANCELLED
        try:
            async with self._deadlines.limit(call.deadline_s):
                if before:
                    await asyncio.wait(before)
                observation = CUT if self._writes(call) else CANCELLED
                observation = self._refusal(call) or await self._observe(call)
        except TimeoutError:
            observation = observation._replace(tool=call.name)
        finally:
            del self._pending[call.call_id]
        self._ledger.charge(observation)
        self._over = self._over or observation.ended
        self.last_used_s = time.monotonic()
        return CallResult(call.session_id, call.call_id, *observation)

    def _refusal(self, call: Call) -> Observation | None:
        """Why no tool sees `call`, or None."""
        if self._over or self.opened.error is not None:
            error = "session_over" if self._over else "unknown_session"
            return Observation(call.name, "the session takes no more calls", error=error, ended=True)
        if not call.name:
            if isinstance(call.arguments.get("content"), str):
                return None
            return Observation("", "$.content: a message is a string", error="invalid_arguments")
        if call.name not in self._names:
            content = f"unknown tool; allowed: {', '.join(self._names)}"
            return Observation(call.name, content, error="unknown_tool")
        mistake = self._toolbox.checks[call.name](call.arguments)
        if mistake:
            return Observation(call.name, mistake, error="invalid_arguments")
        spent = self._spent()
        return Observation(call.name, spent, error="budget_exceeded") if spent else None

    def _spent(self) -> str | None:
        """Which budget is used up. Calls count when they start, so that parallel ones cannot pass together."""
        budget, bill = self._setup.budget, self._ledger
        if budget.calls is not None and self._num_calls >= budget.calls:
            return _over_budget(budget.calls, "calls")
        if budget.usd is not None and bill.cost_usd >= budget.usd:
            return _over_budget(budget.usd, "usd")
        if budget.seconds is not None and bill.latency_s >= budget.seconds:
            return _over_budget(budget.seconds, "seconds")
        return None

    async def _observe(self, call: Call) -> Observation:
        if not call.name:
            return Observation("", "answered", ended=True)
        self._num_calls += 1
        setup = self._setup
        context = CallContext(call.session_id, self.wanted.seed, setup.depth, setup.simulation, setup.clock_s)
        output = await self._toolbox.call(call.name, call.arguments, context)
        spec = self._toolbox.tools[call.name].spec
        return Observation(
            call.name,
            output.content,
            billed_usd(self._prices[call.name], spec, output),
            billed_s(spec, output),
            output.error,
            ended=output.error == "infra_error",
            work_s=output.work_s,
            wait_s=output.wait_s,
        )

    async def _judge(self, pending: list[asyncio.Task[CallResult]]) -> SessionRecord:
        """The record, after the calls under way."""
        if pending:
            await asyncio.wait(pending)
        self._over = True
        return await settle(self.wanted, self._setup, self.history(), self._verifiers.verify)


def _over_budget(most: float, unit: str) -> str:
    return f"the budget of {most:g} {unit} is spent: answer now"


async def settle(
    session: OpenSession, setup: ToolsSetup, history: Sequence[tuple[Call, CallResult]], verify: Verify
) -> SessionRecord:
    """The record that follows from a session's set-up and calls. Without a final answer the task is unsolved."""
    ledger, answer, error = Ledger(), None, None
    for call, result in history:
        ledger.charge(result)
        if result.error == "infra_error":
            error = "infra_error"
        if not call.name and result.error is None:
            answer = call.arguments["content"]
    outcome, verdict = 0.0, None
    if error is None and answer is not None:
        outcome = 1.0
        if setup.verifier is not None:
            try:
                found = await verify(setup.verifier, setup.question or "", answer)
                verdict, outcome = asdict(found), found.value
                error = None if found.valid else "infra_error"
            except Exception:
                log.exception("the verifier failed", extra={"session": session.session_id})
                error, outcome = "env_error", 0.0
    sums = ledger.cost_usd, ledger.latency_s, ledger.tool_counts
    return SessionRecord(session.session_id, outcome, *sums, error, verdict, session.preference)

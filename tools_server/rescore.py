"""`python -m tools_server rescore`: the records of stored traces, computed again and compared bit for bit.

Sessions of the server's tools are settled from their recorded results; other environments, which are deterministic,
play their calls again. A judge and unit tests are not asked again: their stored verdict stands where the digest of its
inputs is still the same. What a model said as tau2's user is said again; assertions that a model judged are left out.
"""

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools_server import registry
from tools_server.config import ServerConfig, Tau2Config, load_config
from tools_server.ledger import Ledger
from tools_server.sessions import Sessions
from tools_server.tool_session import ToolsSetup, settle
from tools_server.trace import Trace, read_trace
from tools_server.verifiers import PURE, Verdict, impure_digest, verify
from tools_server.wire import OpenSession, SessionRecord


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools_server rescore",
        description="Compute the records of traces again; exit status 1 where one differs.",
    )
    parser.add_argument("traces", type=Path, help="JSONL that the server wrote (key `traces`)")
    parser.add_argument("--config", type=Path, help="the server's config: needed for sessions with simulated experts")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config) if arguments.config else ServerConfig.model_validate({})
    num_equal, different = asyncio.run(rescore(arguments.traces, config))
    for line in different:
        print(line)
    print(f"{num_equal}/{num_equal + len(different)} records are the same")
    return 1 if different else 0


async def rescore(path: Path, config: ServerConfig) -> tuple[int, list[str]]:
    """How many records are the same, and a line for each other one. Raises ValueError where the file is no traces."""
    num_equal, different = 0, []
    outside = {"traces": None, "recording": None, "spans_url": None, "tools": {}, "tau2": Tau2Config.model_validate({})}
    sessions = Sessions(config.model_copy(update={"time_scale": 0.0, **outside}))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        trace = read_trace(line, f"{path}:{number}")
        try:
            record = await record_of(trace, sessions, config.tau2.user)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if record == trace.record:
            num_equal += 1
        else:
            different.append(f"{path}:{number}: {trace.session.session_id}: {_difference(trace.record, record)}")
    await sessions.close()
    return num_equal, different


async def record_of(trace: Trace, sessions: Sessions, default_user: str = "silent") -> SessionRecord:
    """The record of `trace`, from its session and calls alone. Raises ValueError where it cannot be had.

    `default_user`: of tau2's tasks that name none.
    """
    if trace.session.environment == registry.TOOLS:
        setup = ToolsSetup.model_validate(trace.session.setup)

        async def verify_again(verifier: Any, question: str, answer: str) -> Verdict:
            if isinstance(verifier, PURE):
                return verify(verifier, answer)
            stored, seen = trace.record.verdict, impure_digest(verifier, question, answer)
            if stored is None or stored["inputs_digest"] != seen:
                return Verdict(0.0, "the stored verdict is not of these inputs", seen, valid=False)
            return Verdict(**stored)

        return await settle(trace.session, setup, trace.calls, verify_again)
    if any(result.error == "infra_error" for _, result in trace.calls):  # cut half-way: there was nothing to judge
        bill = Ledger()
        for _, result in trace.calls:
            bill.charge(result)
        sums = bill.cost_usd, bill.latency_s, bill.tool_counts
        session = trace.session
        return SessionRecord(session.session_id, 0.0, *sums, "infra_error", preference=session.preference)
    opened = await _answer(sessions.open(_without_models(trace, default_user)))
    if opened.error is not None:
        raise ValueError(f"the session cannot be opened: {opened.error}")
    for call, result in trace.calls:
        if result.error == "cancelled":
            continue  # the environment never saw it
        again = await _answer(sessions.call(call))
        if again != result:
            raise ValueError(f"call {call.call_id} is answered otherwise: {_difference(result, again)}")
    return await _answer(sessions.finish(trace.session.session_id))


def _without_models(trace: Trace, default_user: str) -> OpenSession:
    """The session, its user a recording of what a model said. Raises ValueError where that is not enough."""
    session = trace.session
    if session.environment not in ("tau2", "toolscale") or session.setup.get("user", default_user) != "llm":
        return session
    if session.environment == "tau2" and session.setup.get("domain") == "telecom":
        raise ValueError("its user was a model that acted with tools of its own, of which the trace holds nothing")
    replies = [result.content for call, result in trace.calls if not call.name and result.error is None]
    return replace(session, setup=session.setup | {"user": "recorded", "replies": ["(the first message)", *replies]})


async def _answer(answer: Any) -> Any:
    return await answer if isinstance(answer, asyncio.Future) else answer


def _difference(stored: Any, again: Any) -> str:
    """The first field that differs."""
    for name in stored.__slots__:
        before, now = getattr(stored, name), getattr(again, name)
        if before != now:
            return f"{name} was {before!r:.200}, is {now!r:.200}"
    raise AssertionError("equal")

"""Traces: every finished session as one line of JSON, enough to compute its record again.

{"version": 1, "session": OpenSession, "record": SessionRecord,
 "calls": [{"call": Call, "result": CallResult}, ...]}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools_server.errors import log
from tools_server.wire import Call, CallResult, OpenSession, SessionRecord, to_json

VERSION = 1


class Trace(NamedTuple):
    """One finished session."""

    session: OpenSession
    calls: Sequence[tuple[Call, CallResult]]
    """In the order in which they were asked for."""
    record: SessionRecord


class TraceFile:
    """Appends to a file. What cannot be written is logged, and `failed` says so until a write succeeds again."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where `path` cannot be written."""
        self.failed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ValueError(f"traces: {path} cannot be written ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()

    def write(self, trace: Trace) -> None:
        """One system call a line, so that a crash cuts the last line at most."""
        line = json.dumps(_to_json(trace)).encode() + b"\n"
        try:
            self.failed = self._file.write(line) != len(line)
        except OSError as error:
            self.failed = True
            log.error("a trace was not written: %s", error.strerror, extra={"session": trace.session.session_id})


def read_trace(line: str, where: str) -> Trace:
    """Raises ValueError where `line` is no trace; `where` begins the message."""
    try:
        fields = json.loads(line)
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']}, expected {VERSION}")
        calls = [(Call(**item["call"]), CallResult(**item["result"])) for item in fields["calls"]]
        return Trace(OpenSession(**fields["session"]), calls, SessionRecord(**fields["record"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: no trace ({type(error).__name__}: {error})") from None


def _to_json(trace: Trace) -> dict[str, Any]:
    return {
        "version": VERSION,
        "session": to_json(trace.session),
        "calls": [{"call": to_json(call), "result": to_json(result)} for call, result in trace.calls],
        "record": to_json(trace.record),
    }

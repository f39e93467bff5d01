"""Logs go to stderr: text for who reads them on a terminal, elsewhere JSON, a line a record, for what collects them.

{"time": "2026-01-31T12:00:00.000+00:00", "level": "ERROR", "logger": "tools_server", "message": "...",
 "session": "...", "tool": "...", "exception": "Traceback ..."}; the last three where there is one.
"""

import json
import logging
import sys
from datetime import UTC, datetime

ABOUT = ("session", "tool")
"""What `extra` may say of a record."""


def _about(record: logging.LogRecord) -> dict[str, str]:
    return {name: vars(record)[name] for name in ABOUT if name in vars(record)}


class TextLines(logging.Formatter):
    """A record as a line that ends in what it is about."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in _about(record).items())


class JsonLines(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _about(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging() -> None:
    """For this process, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextLines() if sys.stderr.isatty() else JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])

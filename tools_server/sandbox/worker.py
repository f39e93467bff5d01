"""Runs inside the sandbox: takes its limits, says that it is ready, reads one program from stdin and executes it.

A first line "#!clock SECONDS" (since 1970, UTC) is taken off: `time` and `datetime` tell the program that moment, which
stays. Measured times (`time.monotonic`, `time.perf_counter`) go on.

The server passes this file's text to `python -c`; it imports the least there is, for every sandbox's start has to wait.
Hard limits are set before the program is read: without privileges it cannot raise them.
"""

import os
import resource
import sys

CLOCK = b"#!clock "


def main() -> None:
    for limit in sys.argv[1:]:
        name, _, values = limit.partition("=")
        soft, hard = map(int, values.split(":"))
        resource.setrlimit(getattr(resource, name), (soft, hard))
    os.write(1, b"ready\n")
    source = sys.stdin.buffer.read()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # the lowest free number: 0
    if source.startswith(CLOCK):
        first, _, source = source.partition(b"\n")
        stop_clock(float(first[len(CLOCK) :]))
    sys.argv = ["program"]
    sys.excepthook = lambda kind, error, frames: sys.__excepthook__(kind, *_own(error, frames))
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def stop_clock(now_s):
    import datetime
    import time

    def of_now(real):
        return lambda moment_s=None: real(now_s if moment_s is None else moment_s)

    time.localtime, time.gmtime, time.ctime = map(of_now, (time.localtime, time.gmtime, time.ctime))
    strftime, asctime = time.strftime, time.asctime
    time.strftime = lambda form, moment=None: strftime(form, moment or time.localtime())
    time.asctime = lambda moment=None: asctime(moment or time.localtime())
    now_ns = int(now_s // 1) * 10**9 + int(now_s % 1 * 10**9)
    time.time, time.time_ns = (lambda: now_s), (lambda: now_ns)

    class Kind(type):
        """What others made of the classes that are replaced counts as made of these."""

        def __instancecheck__(cls, x):
            return isinstance(x, real[cls]) if cls in real else type.__instancecheck__(cls, x)

        def __subclasscheck__(cls, kind):
            return issubclass(kind, real[cls]) if cls in real else type.__subclasscheck__(cls, kind)

    class Printed:
        def __repr__(self):
            return "datetime." + super().__repr__()

    class date(Printed, datetime.date, metaclass=Kind):
        @classmethod
        def today(cls):
            return cls.fromtimestamp(now_s)

    class moment(Printed, datetime.datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(now_s, tz)

        @classmethod
        def today(cls):
            return cls.fromtimestamp(now_s)

        @classmethod
        def utcnow(cls):
            return cls.fromtimestamp(now_s, datetime.timezone.utc).replace(tzinfo=None)  # noqa: UP017 (any Python 3)

    moment.__name__ = moment.__qualname__ = "datetime"
    date.__qualname__ = "date"
    date.__module__ = moment.__module__ = "datetime"
    real = {date: datetime.date, moment: datetime.datetime}
    datetime.date, datetime.datetime = date, moment


def _own(error, frames):
    """Without this file's frames."""
    own = frames.tb_next.tb_next if frames and frames.tb_next else None
    return error.with_traceback(own), own


if __name__ == "__main__":
    main()

"""Runs inside the sandbox: takes its limits, says that it is ready, reads one program from stdin and executes it.

The server passes this file's text to `python -c`; it imports the least there is, for every sandbox's start has to wait.
Hard limits are set before the program is read: without privileges it cannot raise them.
"""

import os
import resource
import sys


def main() -> None:
    for limit in sys.argv[1:]:
        name, _, values = limit.partition("=")
        soft, hard = map(int, values.split(":"))
        resource.setrlimit(getattr(resource, name), (soft, hard))
    os.write(1, b"ready\n")
    source = sys.stdin.buffer.read()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # the lowest free number: 0
    sys.argv = ["program"]
    sys.excepthook = lambda kind, error, frames: sys.__excepthook__(kind, *_own(error, frames))
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def _own(error, frames):
    """Without this file's frames."""
    own = frames.tb_next.tb_next if frames and frames.tb_next else None
    return error.with_traceback(own), own


if __name__ == "__main__":
    main()

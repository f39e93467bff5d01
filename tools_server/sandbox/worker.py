"""Runs inside the sandbox: takes its limits, says that it is ready, reads one program from stdin and executes it.

The server passes this file's text to `python -c`; it imports the standard library only. Hard limits are set before the
program is read: without privileges it cannot raise them.
"""

import json
import os
import resource
import sys
import traceback


def main() -> None:
    for name, soft_and_hard in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), tuple(soft_and_hard))
    os.write(1, b"ready\n")
    source = sys.stdin.buffer.read()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # the lowest free number: 0
    sys.argv = ["program"]
    sys.excepthook = lambda kind, error, frames: traceback.print_exception(kind, error, frames and _own(frames))
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def _own(frames):
    """Without this file's frames."""
    return frames.tb_next.tb_next if frames.tb_next else None


if __name__ == "__main__":
    main()

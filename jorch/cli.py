"""The command line: parse, validate, then import the stage and run it. `--help` and `--dry-run` need no jax.

    jorch COMMAND CONFIG.yaml [KEY=VALUE ...] [options]

Exit status: 0; 2 where the user can mend it (one line on stderr); 1 where the tool server or the disk gave
out (one line) or for an error of our own (a traceback); 130 after Ctrl-C, 143 after SIGTERM (one line: how to go on).
"""

import argparse
import errno
import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from jorch import arguments, config_io, stopping

MISTAKES = (
    errno.EACCES,
    errno.EADDRINUSE,
    errno.EADDRNOTAVAIL,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
DISK_GAVE_OUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
STAGES = {
    "quickstart": "jorch.quickstart",
    "sft": "jorch.synth.sft",
    "rl": "jorch.rl.loop",
    "eval": "jorch.evals.harness",
    "import": "jorch.export.importing",
    "export": "jorch.export.checkpoint",
    "verify": "jorch.export.verify",
    "serve": "jorch.serving.vllm",
    "bench": "jorch.bench.loop",
}
"""What takes seconds to import, jax above all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Exceptions that are errors of our own pass through."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command, loaded, options = arguments.parse(argv)
        if options.dry_run and command != "launch":
            print(config_io.dump(loaded), end="")
            return 0
        if command in STAGES:
            if getattr(options, "process", None):
                from jorch import processes

                processes.join(options.process)
            with _interrupts_held_back():
                _quiet_libraries()
                importlib.import_module(STAGES[command])
        match command:
            case "quickstart":
                from jorch import quickstart

                quickstart.run(loaded, fresh=options.fresh, from_scratch=options.from_scratch)
            case "sft":
                from jorch.synth import sft

                sft.run(loaded, resume=options.resume, fresh=options.fresh)
            case "rl":
                from jorch.rl import loop

                loop.run(loaded, resume=options.resume, fresh=options.fresh)
            case "eval":
                from jorch.evals import harness

                harness.run(loaded, fresh=options.fresh)
            case "import":
                from jorch.export import importing

                importing.run(options.source, options.out, options.dtype)
            case "verify":
                from jorch.export import verify

                verify.run(options.source, options.against, options.python)
            case "export":
                from jorch.export import checkpoint

                checkpoint.run(
                    options.source,
                    options.out,
                    step=options.step,
                    widen_heads=options.widen_heads,
                    lora=options.lora,
                    dtype=options.dtype,
                )
            case "serve":
                from jorch.serving import vllm

                vllm.serve(vllm.options(loaded), Path(loaded.log))
            case "bench":
                _bench(options)
            case "plan":
                os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is planned for need not be here
                from jorch.plan import command as planner

                planner.run(
                    loaded,
                    options.topology,
                    attention=options.attention,
                    with_compile=not options.no_compile,
                    as_json=options.json,
                )
            case "launch":
                from jorch.launch import command as launcher

                launcher.run(options)
            case "tools-server":
                _become_tool_server(options)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, argv)
    return 0


def _bench(options: argparse.Namespace) -> None:
    from jorch.bench import checkpoint, kernels, loop, sampler, serving, train

    match options.what:
        case "kernels":
            kernels.run(options.json, options.tokens, options.only)
        case "checkpoint":
            checkpoint.run(options.json)
        case "train":
            train.run(options.json, options.tokens, options.layers, options.lora, options.remat)
        case "sampler":
            sampler.run(options.json)
        case "serving":
            serving.run(options.json, options.only)
        case "loop":
            loop.run(options.json)


def _become_tool_server(options: argparse.Namespace) -> NoReturn:
    """Replace this process, so that signals and the exit status are the server's own."""
    command = [sys.executable, "-m", "tools_server", "--config", str(options.config)]
    for key, value in (("--host", options.host), ("--port", options.port)):
        if value is not None:
            command += [key, str(value)]
    os.execv(sys.executable, command)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: native modules turn one during their import into other errors."""
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """What fails is raised, too; between progress bars the logs of Orbax and of its event loops have no place."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.excepthook = _print_uncaught
    sys.unraisablehook = _print_unraisable


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not _is_late_report(error, trace):
        sys.__excepthook__(kind, error, trace)


def _print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if not _is_late_report(unraisable.exc_value, unraisable.exc_traceback):
        sys.__unraisablehook__(unraisable)


def _is_late_report(error: BaseException | None, trace: TracebackType | None) -> bool:
    """After a failed save tensorstore's threads report every further array to an event loop that has gone."""
    called = trace.tb_frame.f_code.co_name if trace else ""
    return called == "call_soon_threadsafe" and str(error) == "Event loop is closed"


def _report(error: BaseException, argv: list[str]) -> int:
    """Print the line for an error that is not our own and give its exit status; raise it again otherwise."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    again = _command_to_go_on(argv)
    match error:
        case KeyboardInterrupt():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest takes a moment, and leaves nothing to stop
            line, status = f"interrupted{again}", 130
        case stopping.Terminated():
            line, status = f"{error}{again}", stopping.STATUS
        case ConnectionError():
            line, status = f"error: {error}{again}", 1
        case ChildProcessError():
            line, status = f"error: {error}{again}", 1
        case OSError() if error.errno in DISK_GAVE_OUT:
            line, status = f"error: {_about(error)}{again}", 1
        case OSError() if error.errno in MISTAKES:
            line, status = f"error: {_about(error)}", 2
        case ValueError() if _raised_by_us(error):
            line, status = f"error: {error}", 2
        case _:
            raise error
    print("jorch:", " ".join(line.split()), file=sys.stderr)
    return status


def _about(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def _command_to_go_on(argv: list[str]) -> str:
    kept = [word for word in argv if word not in ("--fresh", "--resume")]
    if argv and argv[0] in arguments.RESUMABLE:
        kept.append("--resume")
    elif argv[:1] != ["quickstart"]:
        return ""
    return f"; go on with: {shlex.join(['jorch', *kept])}"


def _raised_by_us(error: BaseException) -> bool:
    """A ValueError out of a library is a bug of ours, whose traceback is wanted."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in ("jorch", "tools_server")

"""`python -m tools_server CONFIG.yaml`: serve until SIGTERM, Ctrl-C or, on request, the parent's death.

The first line on stdout says the address. Exit status: 0 after such a stop, 2 after a user's mistake. Other
commands take the config's place: `python -m tools_server index DOCUMENTS --out FILE`.
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import importlib
import ipaddress
import os
import signal
import socket
import stat
import sys
from pathlib import Path

from aiohttp import web

from tools_server.app import SESSIONS, make_app
from tools_server.config import TOKEN_VARIABLE, ServerConfig, load_config
from tools_server.errors import log, one_line
from tools_server.logs import start_logging
from tools_server.sessions import Sessions

DRAIN_S = 8.0
"""How long a stopping server waits for calls under way."""

COMMANDS = {
    "index": ("tools_server.index", "build the index of a search tool"),
    "bench": ("tools_server.bench", "measure the server on this machine"),
    "conformance": ("tools_server.conformance", "play a benchmark's gold calls over HTTP"),
    "baselines": ("tools_server.baselines", "what agents score that do not try"),
    "rescore": ("tools_server.rescore", "compute the records of stored traces again"),
    "import-prices": ("tools_server.prices", "price table from litellm's public JSON"),
}
"""Module, whose `main` takes the arguments, and purpose."""


def main() -> int:
    try:
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:
            module, _ = COMMANDS[sys.argv[1]]
            return importlib.import_module(module).main(sys.argv[2:])
        return _serve(_parse())
    except ValueError as error:
        print(one_line(error, max_characters=1000), file=sys.stderr)
        return 2


def _serve(arguments: argparse.Namespace) -> int:
    start_logging()
    config = load_config(arguments.config or arguments.config_option)
    overrides = {"host": arguments.host, "port": arguments.port}
    config = config.model_copy(update={key: value for key, value in overrides.items() if value is not None})
    if arguments.check:
        return asyncio.run(check(config))
    asyncio.run(serve(config, arguments.exit_with_parent))
    return 0


async def check(config: ServerConfig) -> int:
    """Start every tool once, say what is missing, and stop. Chat endpoints are asked one short question."""
    sessions = Sessions(config)
    faults = await sessions.toolbox.check()
    await sessions.close()
    for fault in faults:
        print(fault)
    print(f"{len(config.tools) - len(faults)}/{len(config.tools)} tools can be used")
    return 1 if faults else 0


async def serve(config: ServerConfig, exit_with_parent: bool) -> None:
    """Serve until told to stop, then drain. Raises ValueError where it cannot listen."""
    open_to_all = not os.environ.get(TOKEN_VARIABLE)
    if open_to_all and not _is_loopback(config.host):
        raise ValueError(f"host {config.host} is open to other machines: set {TOKEN_VARIABLE}, or use 127.0.0.1")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if exit_with_parent:
        _watch_parent(stop)
    app = make_app(config)
    app.on_shutdown.append(_end_calls)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S, handler_cancellation=True)
    try:
        await runner.setup()
        await _listen(runner, config)
        _spare_collector()
        if measured := [name for name, tool in app[SESSIONS].toolbox.tools.items() if tool.spec.latency_s is None]:
            log.warning("measured times, and so the load, count in rewards: set latency_s of %s", ", ".join(measured))
        if open_to_all:
            log.warning("no token is asked for, so whoever works on this machine may call: set %s", TOKEN_VARIABLE)
        host, port = runner.addresses[0][:2]
        print(f"tools-server ready http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await stop.wait()
        await _drain(app[SESSIONS], config.drain_s)
    finally:
        await runner.cleanup()


def _spare_collector() -> None:
    """Modules, schemas and tools last as long as the server: the garbage collector need not walk through them, call by
    call. For cycles of younger objects it looks after 10,000 new ones, not 700.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def _drain(sessions: Sessions, drain_s: float) -> None:
    """Open no more sessions, and let the open ones go on for a while."""
    sessions.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(drain_s):
            while len(sessions):
                await asyncio.sleep(0.05)


async def _end_calls(app: web.Application) -> None:
    """No request comes any more. Calls may end by themselves for a while; the rest is answered `cancelled`."""
    await app[SESSIONS].deadlines.end(DRAIN_S)


async def _listen(runner: web.AppRunner, config: ServerConfig) -> None:
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except socket.gaierror as error:
        reason = f"cannot listen on {config.host}: {error.strerror}"
        raise ValueError(f"{reason}; pass --host with another") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {config.port} is in use on {config.host}"
            raise ValueError(f"{reason}; pass --port with another, or 0 for a free one") from None
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"cannot listen on {config.host}:{config.port}: {reason}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _watch_parent(stop: asyncio.Event) -> None:
    """The parent holds the other end of stdin. However it dies, that end closes, and stdin ends."""
    stdin = sys.stdin.fileno()
    if not stat.S_ISFIFO(os.fstat(stdin).st_mode):
        raise ValueError("--exit-with-parent needs a pipe from the parent as stdin")
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            stop.set()

    loop.add_reader(stdin, read)


def _parse() -> argparse.Namespace:
    commands = "\n".join(f"  {name:14}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools_server",
        description="jorch's tool server",
        epilog=f"other commands, in the config's place:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = parser.add_mutually_exclusive_group(required=True)
    config.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="its keys: jorch tools-server --help"
    )
    config.add_argument("--config", dest="config_option", type=Path, metavar="CONFIG.yaml", help="the same")
    parser.add_argument("--check", action="store_true", help="start every tool once, say what is missing, and stop")
    parser.add_argument("--host", help="address to listen on, instead of the file's")
    parser.add_argument("--port", type=_port, help="port, instead of the file's; 0 = a free one")
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when stdin, a pipe, closes")
    return parser.parse_args()


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0..65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""Programs run in the sandboxes of another tool server, over HTTP: both ends of `POST /v1/programs`.

{"tool": "python", "source": "print(1)", "timeout_s": 20.0}
-> {"run": {fields of `bubblewrap.Run`, stdout and stderr in base64}, "wait_s": seconds}
or {"failure": "a sandbox did not start: ..."}
"""

import base64
from dataclasses import asdict
from typing import Any, Protocol

from tools_server.config import RemotePythonConfig
from tools_server.endpoint import Endpoint, EndpointFailure, EndpointLimits, RequestRefused
from tools_server.errors import BadRequest, UnknownTool
from tools_server.sandbox.bubblewrap import Run, SandboxFailure

PATH = "/v1/programs"
REQUEST_FIELDS = ("tool", "source", "timeout_s")
MARGIN_S = 30.0
"""Beyond a program's own time: queue, start and way."""


class Runner(Protocol):
    """What runs programs: a pool of sandboxes here, or another server's."""

    async def __aenter__(self) -> "Runner":
        """Raises ValueError where no program can be run."""
        ...

    async def __aexit__(self, *_: object) -> None: ...

    async def run(self, source: str, timeout_s: float) -> tuple[Run, float]:
        """The program's run, and the seconds that it waited for a sandbox. Raises SandboxFailure."""
        ...


class RemoteRunner:
    """The sandboxes of another server's tool."""

    def __init__(self, config: RemotePythonConfig) -> None:
        limits = EndpointLimits(
            timeout_s=config.timeout_s + MARGIN_S,
            retries=config.retries,
            concurrency=config.concurrency,
            max_answer_bytes=config.max_answer_bytes,
        )
        self._tool = config.tool
        self._endpoint = Endpoint(config.url, limits, config.key_variable)

    async def __aenter__(self) -> "RemoteRunner":
        await self._endpoint.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._endpoint.close()

    async def run(self, source: str, timeout_s: float) -> tuple[Run, float]:
        request = {"tool": self._tool, "source": source, "timeout_s": timeout_s}
        try:
            exchange = await self._endpoint.post(PATH, request)
            if "failure" in exchange.payload:
                raise SandboxFailure(str(exchange.payload["failure"]))
            fields = exchange.payload["run"]
            decoded = {name: base64.b64decode(fields[name]) for name in ("stdout", "stderr")}
            run = Run(**fields | decoded)
            way_s = exchange.work_s - run.work_s  # the other server's queue is part of it
            return run, exchange.wait_s + max(way_s, 0.0)
        except (EndpointFailure, RequestRefused) as error:
            raise SandboxFailure(f"the remote sandbox failed: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxFailure(f"{self._endpoint.url} answers in another form ({error!r})") from None


async def serve_program(payload: dict[str, Any], runners: dict[str, tuple[Runner, float]]) -> dict[str, Any]:
    """The answer to a request's `payload`. `runners`: by tool, with the longest time of a program there.

    Raises BadRequest, UnknownTool where no such tool runs programs.
    """
    if payload.keys() != set(REQUEST_FIELDS):
        raise BadRequest(f"expected the fields {', '.join(REQUEST_FIELDS)}; got {', '.join(payload)}")
    tool, source, timeout_s = (payload[name] for name in REQUEST_FIELDS)
    if not isinstance(source, str) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise BadRequest("source: expected a string; timeout_s: expected a number above 0")
    if not isinstance(tool, str):
        raise BadRequest("tool: expected a string")
    if tool not in runners:
        raise UnknownTool(f"tool: got {tool[:40]!r}, programs are run by {', '.join(runners) or 'none here'}")
    runner, most_s = runners[tool]
    try:
        run, wait_s = await runner.run(source, float(min(timeout_s, most_s)))
    except SandboxFailure as failure:
        return {"failure": str(failure)}
    encoded = {name: base64.b64encode(getattr(run, name)).decode() for name in ("stdout", "stderr")}
    return {"run": asdict(run) | encoded, "wait_s": wait_s}

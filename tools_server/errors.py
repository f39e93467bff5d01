"""How failures travel: as an observation's `error`, or as an HTTP status with one line of JSON."""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from tools_server.wire import FAILURES

UNBILLED = frozenset(FAILURES) - {"tool_error", "timeout"}
"""Errors of calls that no tool carried out: they cost nothing and count as no use of a tool."""

log = logging.getLogger("tools_server")


class BadRequest(ValueError):
    """A request that no retry can make right: an HTTP status with its text."""

    status = 400


class UnknownSession(BadRequest):
    """No such session is open here."""

    status = 404


class UnknownTool(BadRequest):
    """No such tool does that here."""

    status = 404


class Conflict(BadRequest):
    """What the session's calls so far do not allow."""

    status = 409


class Busy(Exception):
    """A cap is reached: HTTP 429, and nothing of the request was accepted. It may be sent again."""

    retry_after_s = 1


def one_line(error: BaseException, max_characters: int = 300) -> str:
    """An exception's text on one line, or its type's name where it has no text."""
    return " ".join(str(error).split())[:max_characters] or type(error).__name__


def name_and_line(error: BaseException) -> str:
    """Type and text of an exception that is nobody's expected message."""
    return f"{type(error).__name__}: {one_line(error)}"


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every answer that is not 2xx has the body {"error": one line}."""
    try:
        return await handler(request)
    except BadRequest as error:
        return web.json_response({"error": one_line(error)}, status=error.status)
    except Busy as error:
        headers = {"Retry-After": str(error.retry_after_s)}
        return web.json_response({"error": one_line(error)}, status=429, headers=headers)
    except web.HTTPRequestEntityTooLarge as error:
        line = f"{error.text} (the server's max_request_bytes)"
        return web.json_response({"error": line}, status=error.status)
    except web.HTTPException as error:
        line = f"{error.reason}: {request.method} {request.path}"
        kept = {name: error.headers[name] for name in ("Allow", "WWW-Authenticate") if name in error.headers}
        return web.json_response({"error": line}, status=error.status, headers=kept)
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return web.json_response({"error": name_and_line(error)}, status=500)

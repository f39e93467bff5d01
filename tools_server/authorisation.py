"""Who may ask what: the server's bearer token, and tokens that are good for one session alone.

A session's token is `DIGEST.MAC`: a digest of the session's id, and its authentication code under a key of this
process. The server thus stores none. All comparisons take the same time whatever is compared.
"""

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tools_server.config import TOKEN_VARIABLE

OPEN_PATHS = ("/healthz", "/readyz")
"""Probes have no token."""
HOLDER = web.RequestKey("holder", str)
"""The digest of the session whose token it bears; absent where it may do everything."""


class Capabilities:
    """Issues sessions' tokens and knows its own."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def token(self, session_id: str) -> str:
        digest = _digest(session_id)
        return f"{digest}.{self._mac(digest)}"

    def holder(self, token: str) -> str | None:
        """The digest in a token of this server's, or None."""
        digest, _, mac = token.partition(".")
        return digest if hmac.compare_digest(mac.encode(), self._mac(digest).encode()) else None

    def _mac(self, digest: str) -> str:
        return hmac.new(self._key, digest.encode(), hashlib.sha256).hexdigest()


def allow_session(request: web.Request, session_id: str) -> None:
    """Raises HTTPForbidden where the request bears another session's token."""
    holder = request.get(HOLDER)
    if holder is not None and not hmac.compare_digest(holder, _digest(session_id)):
        raise web.HTTPForbidden(reason="this token is another session's")


def allow_server_only(request: web.Request) -> None:
    """Raises HTTPForbidden where the request bears a session's token."""
    if HOLDER in request:
        raise web.HTTPForbidden(reason="this needs the server's token, not a session's")


def authorisation(token: str, capabilities: Capabilities) -> Any:
    """The middleware. With an empty `token` the server asks for none, but checks those that it is given."""
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check_token(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path in OPEN_PATHS or hmac.compare_digest(given, expected) or not (token or given):
            return await handler(request)
        holder = capabilities.holder(given.decode("latin-1").removeprefix("Bearer "))
        if holder is None and token:
            reason = f"wrong or missing bearer token (set {TOKEN_VARIABLE})"
            raise web.HTTPUnauthorized(reason=reason, headers={"WWW-Authenticate": "Bearer"})
        if holder is not None:
            request[HOLDER] = holder
        return await handler(request)

    return check_token


def _digest(session_id: str) -> str:
    return hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()[:32]

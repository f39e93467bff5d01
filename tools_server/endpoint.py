"""A JSON service behind HTTP that other people run: limits, retries in one layer, and a circuit breaker.

Time is kept in two purses: the attempt that succeeded is the service's work, all else (queue, back-off, failed
attempts) is waiting, so that a busy provider is not mistaken for a slow model.
"""

import asyncio
import base64
import json
import os
import random
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses of failures that may pass."""
REQUEST_FAULTS = frozenset({400, 413, 422})
"""Statuses that say that this request can never succeed."""
MAX_PAUSE_S = 60.0
"""Between two attempts, whatever Retry-After asks for."""


class EndpointFailure(RuntimeError):
    """No answer after all attempts, or none asked because the breaker is open. `wait_s`: the seconds it took."""

    def __init__(self, line: str, wait_s: float = 0.0) -> None:
        super().__init__(line)
        self.wait_s = wait_s


class RequestRefused(ValueError):
    """The service will not take this request; another might do."""


class Exchange(NamedTuple):
    """An answer, the seconds of the attempt that got it, and those spent waiting."""

    payload: dict[str, Any]
    work_s: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """`timeout_s` is of one attempt; the meaning of each key is `config.ChatConfig`'s."""

    timeout_s: float
    retries: int
    backoff_s: float = 1.0
    concurrency: int = 16
    requests_per_minute: float | None = None
    breaker_failures: int = 5
    breaker_pause_s: float = 30.0
    max_answer_bytes: int = 4 * 1024**2


class Breaker:
    """After `failures` in a row nobody asks for `pause_s`; then one request tries, and its end decides."""

    def __init__(self, failures: int, pause_s: float) -> None:
        self._most = failures
        self._pause_s = pause_s
        self._failures = 0
        self._closed_until_s = 0.0

    def admits(self) -> bool:
        """Whether a request may be sent now. In the half-open state only the first one that asks may."""
        if self._failures < self._most:
            return True
        if time.monotonic() < self._closed_until_s:
            return False
        self._closed_until_s = time.monotonic() + self._pause_s
        return True

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self) -> None:
        self._failures += 1
        if self._failures >= self._most:
            self._closed_until_s = time.monotonic() + self._pause_s


def authorization(url: str, key_variable: str | None, scheme: str = "Bearer") -> dict[str, str]:
    """The header that carries the key, if any. Raises ValueError where the variable is not set.

    `scheme` "Basic": the variable holds USER:PASSWORD.
    """
    if key_variable is None:
        return {}
    key = os.environ.get(key_variable)
    if not key:
        raise ValueError(f"{url} needs a key: set the environment variable {key_variable}")
    if scheme == "Basic":
        key = base64.b64encode(key.encode()).decode()
    return {"Authorization": f"{scheme} {key}"}


class Endpoint:
    """One service. Use between `start` and `close`."""

    def __init__(
        self, url: str, limits: EndpointLimits, key_variable: str | None = None, scheme: str = "Bearer"
    ) -> None:
        """`key_variable` names the environment variable with the key: no config holds one."""
        self.url = url.rstrip("/")
        self._limits = limits
        self._key_variable = key_variable
        self._scheme = scheme
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_pause_s)
        self._next_start_s = 0.0

    async def start(self) -> None:
        """Raises ValueError where the key is missing."""
        headers = authorization(self.url, self._key_variable, self._scheme)
        self._http = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._limits.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def close(self) -> None:
        await self._http.close()

    async def post(self, path: str, payload: dict[str, Any], headers: dict[str, str] | None = None) -> Exchange:
        """Raises EndpointFailure and RequestRefused."""
        began_s = time.monotonic()
        body = json.dumps(payload).encode()
        async with self._slots:
            failure = ""
            for attempt in range(self._limits.retries + 1):
                if not self._breaker.admits():
                    pause_s = self._limits.breaker_pause_s
                    failure = f"it is left alone for up to {pause_s:g} s; {failure or 'it failed before'}"
                    break
                await self._keep_rate()
                started_s = time.monotonic()
                answer, failure, pause_s = await self._attempt(path, body, headers or {})
                if answer is not None:
                    self._breaker.succeeded()
                    return Exchange(answer, time.monotonic() - started_s, started_s - began_s)
                self._breaker.failed()
                if attempt < self._limits.retries:
                    back_off_s = self._limits.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                    await asyncio.sleep(min(max(back_off_s, pause_s), MAX_PAUSE_S))
        raise EndpointFailure(f"{self.url} does not answer: {failure}", time.monotonic() - began_s)

    async def _attempt(
        self, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[dict[str, Any] | None, str, float]:
        """The answer; or None, what went wrong, and the seconds that the service asks to be left alone."""
        headers = {"Content-Type": "application/json"} | headers
        try:
            async with self._http.post(self.url + path, data=body, headers=headers) as response:
                content = await response.content.read(self._limits.max_answer_bytes + 1)
                while len(content) <= self._limits.max_answer_bytes and (more := await response.content.read(65536)):
                    content += more
                status, asked = response.status, response.headers.get("Retry-After", "")
        except TimeoutError:
            return None, f"nothing within {self._limits.timeout_s:g} s", 0.0
        except (aiohttp.ClientError, OSError) as error:
            return None, " ".join(str(error).split())[:200] or type(error).__name__, 0.0
        if len(content) > self._limits.max_answer_bytes:
            return None, f"more than {self._limits.max_answer_bytes} bytes", 0.0
        line = f"HTTP {status}: {' '.join(content[:200].decode(errors='replace').split())}"
        if status in REQUEST_FAULTS:
            self._breaker.succeeded()
            raise RequestRefused(line)
        if status != 200:
            if status not in PASSING:
                raise EndpointFailure(f"{self.url} refused {path}: {line}")
            return None, line, float(asked) if asked.isdigit() else 0.0
        try:
            payload = json.loads(content)
        except ValueError:
            return None, "an answer that is not JSON", 0.0
        return (payload, "", 0.0) if isinstance(payload, dict) else (None, "an answer that is no object", 0.0)

    async def _keep_rate(self) -> None:
        """Wait for this request's turn where the rate is limited."""
        if self._limits.requests_per_minute is None:
            return
        now_s = time.monotonic()
        start_s = max(now_s, self._next_start_s)
        self._next_start_s = start_s + 60.0 / self._limits.requests_per_minute
        await asyncio.sleep(start_s - now_s)

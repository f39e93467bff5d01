"""A model behind OpenAI's chat completions: one request at a time per task, with retries. Used by `chat_policy.py`."""

import asyncio
import json
import os
from typing import Any, Self

import aiohttp

from jorch.config import EndpointConfig

KEY_VARIABLE = "JORCH_ENDPOINT_KEY"
BACKOFF_S = 1.0
"""Before the first retry; doubled before each further one."""
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses of failures that may pass."""
_TOO_LONG = frozenset({400, 413, 422})
"""HTTP statuses for a conversation that the model does not take: it is too long, as a rule."""


class EndpointDown(ConnectionError):
    """The endpoint did not answer after all retries. The message names its address and the last failure."""


class ConversationRefused(Exception):
    """The endpoint will not take this conversation; it takes others."""


class ChatEndpoint:
    """An async context manager; entering it asks for the model's name where the config has none.

    Raises EndpointDown as above, and ValueError where the endpoint refuses the key, the model or the address.
    """

    def __init__(self, config: EndpointConfig, *, timeout_s: float, retries: int) -> None:
        """`timeout_s` limits each attempt; `retries` follow the first one."""
        if not config.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint.url: got {config.url!r}, expected an address such as http://127.0.0.1:8100/v1")
        self.url = config.url.rstrip("/")
        self.model = config.model or ""
        self._timeout_s = timeout_s
        self._retries = retries

    async def __aenter__(self) -> Self:
        key = os.environ.get(KEY_VARIABLE)
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        try:
            if not self.model:
                listed = (await self._request("GET", "/models")).get("data") or []
                if not listed:
                    raise ValueError(f"endpoint {self.url} lists no model: set endpoint.model")
                self.model = str(listed[0]["id"])
        except ConversationRefused as error:
            await self._http.close()
            raise ValueError(f"endpoint {self.url} lists no models ({error}): set endpoint.model") from None
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a chat completion request; its model is filled in. Also raises ConversationRefused."""
        answer = await self._request("POST", "/chat/completions", {"model": self.model, **body})
        if not answer.get("choices"):
            raise ValueError(f"endpoint {self.url} answers /chat/completions without choices: is it one of OpenAI's?")
        return answer

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        failure = ""
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with self._http.request(method, self.url + path, json=body) as response:
                    status, content = response.status, await response.read()
                if status == 200:
                    return json.loads(content)
            except TimeoutError:
                failure = f"no answer within {self._timeout_s:g} s"
                continue
            except (aiohttp.ClientError, OSError) as error:
                failure = str(error) or type(error).__name__
                continue
            except ValueError:
                failure = "an answer that is not JSON"
                continue
            failure = f"HTTP {status}: {' '.join(content.decode(errors='replace').split())[:200]}"
            if status in _TOO_LONG:
                raise ConversationRefused(failure)
            if status not in _PASSING:
                hint = f"; its key is read from {KEY_VARIABLE}" if status in (401, 403) else ""
                raise ValueError(f"endpoint {self.url} refused {path} ({failure}){hint}")
        raise EndpointDown(f"endpoint {self.url} does not answer ({self._retries + 1} attempts at {path}): {failure}")

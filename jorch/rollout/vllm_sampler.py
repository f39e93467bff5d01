"""A `Sampler` over vLLM servers: token ids in, token ids and the log-probabilities they were drawn with out.

A trajectory stays with one server, whose prefix cache knows its earlier turns; new ones go where the fewest requests
are under way: ours, and what the servers' metrics count beyond them. A server that is lost or busy hands its requests
to the others.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from jorch.rollout import server_load, vllm_completions
from jorch.rollout.stats import SamplerStats
from jorch.sections import SamplerConfig
from jorch.types import Completion, CompletionRequest

BACKOFF_S = 0.2
"""Before the first further attempt; doubled before each other one, up to 5 s."""
_MAX_BACKOFF_S = 5.0
_MODEL = "policy"
GENERATE_PATH = "/inference/v1/generate"

Write = Callable[[Any, int], Path]
"""(params, policy version) -> a folder with them that the servers can read."""
Push = Callable[[Path, int, list[str]], dict[str, str]]
"""(that folder, policy version, urls) -> what went wrong, by url."""


class SamplerDown(ConnectionError):
    """No server is left, or none answered in time. The message names the addresses and the last failure."""


@dataclass
class VllmSampler:
    """Sampler of token ids over HTTP; `write` and `push` bring new parameters to the servers."""

    config: SamplerConfig
    urls: Sequence[str]
    stop_id: int
    write: Write
    push: Push
    on_close: Callable[[], object] = lambda: None
    policy_version: int = 0
    takes_adapters: bool = False
    stats: SamplerStats = field(default_factory=SamplerStats)

    def __post_init__(self) -> None:
        assert self.config.vllm is not None
        self.max_context_tokens = self.config.max_context_tokens
        self._timeout_s = self.config.vllm.request_timeout_s
        self._in_flight = dict.fromkeys(self.urls, 0)
        self._num_others = dict.fromkeys(self.urls, 0)
        self._home: dict[str, str] = {}
        self._without_tokens: set[str] = set()
        self._last_failure = "none was tried"

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._session:
            watching = [asyncio.create_task(self._watch(url)) for url in self.urls if len(self.urls) > 1]
            try:
                yield
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)

    def expect(self, trajectory_ids: Sequence[str]) -> None:
        """vLLM batches by itself."""

    def warm_up(self, append_tokens: int) -> None:
        """A server is ready only when it has answered."""

    def release(self, trajectory_id: str) -> None:
        self._home.pop(trajectory_id, None)

    def publish(self, params: Any, policy_version: int) -> None:
        """Raises as `publish_folder`."""
        self.publish_folder(self.write(params, policy_version), policy_version)

    def publish_folder(self, folder: Path, policy_version: int) -> None:
        """Give the servers the weights in `folder`. May be called from another thread.

        Servers that do not take them leave the rotation. Raises SamplerDown where none is left.
        """
        for url, problem in self.push(folder, policy_version, list(self._in_flight)).items():
            self._drop(url, problem)
        if not self._in_flight:
            raise SamplerDown(f"no vLLM server took the weights of version {policy_version}: {self._last_failure}")
        self.policy_version = policy_version

    def close(self) -> None:
        self.on_close()

    async def complete(self, request: CompletionRequest) -> Completion:
        room = self.max_context_tokens - len(request.prompt_token_ids)
        limit = min(request.max_tokens, room)  # vLLM would clip it without a word
        assert limit > 0, f"{len(request.prompt_token_ids)} prompt tokens leave no room in the context"
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        with self.stats.wave():
            while True:
                choice = await self._ask(request, ids, limit - len(ids))
                ids += choice["token_ids"]
                logprobs += [entry["logprob"] for entry in choice["logprobs"]["content"]]
                versions += _versions(choice)
                # An aborted answer holds what was drawn until then: go on from there.
                if choice["finish_reason"] != "abort" or len(ids) >= limit:
                    break
        self.stats.count(len(ids))
        reason = "stop" if ids and ids[-1] == self.stop_id else "length"
        return Completion(np.array(ids, np.int32), np.array(logprobs, np.float32), reason, np.array(versions, np.int32))

    async def _ask(self, request: CompletionRequest, sampled: list[int], limit: int) -> dict[str, Any]:
        """One server's choice. Moves on to others, and back, until `request_timeout_s` is over."""
        backoff_s = BACKOFF_S
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        while self._in_flight and loop.time() < deadline_s:
            url = self._server_of(request.trajectory_id)
            body, path = self.body(request, sampled, limit), GENERATE_PATH
            if url in self._without_tokens:
                body, path = vllm_completions.to_completions(body, url), vllm_completions.PATH
            self._in_flight[url] += 1
            try:
                status, text = await self._post(url + path, body, deadline_s - loop.time())
            except TimeoutError:
                self._drop(url, f"no answer within {self._timeout_s:g} s")
                continue
            except (aiohttp.ClientError, OSError) as error:
                self._last_failure = f"{url}: {str(error) or type(error).__name__}"
                status, text = 503, b""
            finally:
                if url in self._in_flight:
                    self._in_flight[url] -= 1
            if status == 200:
                choice = json.loads(text)["choices"][0]
                if path == GENERATE_PATH:
                    return choice
                return vllm_completions.to_choice(choice, body["cache_salt"], url)
            if status in (403, 404) and path == GENERATE_PATH:
                self._without_tokens.add(url)
                continue
            if 400 <= status < 500:
                raise ValueError(f"vLLM at {url} refused a request (HTTP {status}): {_line(text)}")
            if text:
                self._last_failure = f"{url}: HTTP {status}, {_line(text)}"
            if status == 500:
                self._drop(url, self._last_failure)
                continue
            self._home.pop(request.trajectory_id, None)  # busy or gone: perhaps another one takes it
            await self._drop_if_unreachable(url)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        raise SamplerDown(
            f"no vLLM server answered {request.trajectory_id} ({', '.join(self.urls)}): {self._last_failure}"
        )

    def body(self, request: CompletionRequest, sampled: list[int], limit: int) -> dict[str, Any]:
        """What a server is asked for: at most `limit` tokens after the prompt and what was `sampled` already."""
        return {
            "model": _MODEL,
            "token_ids": [*request.prompt_token_ids.tolist(), *sampled],
            # Keys and values of other weights must never be found again.
            "cache_salt": f"v{self.policy_version}",
            "sampling_params": {
                "n": 1,
                "max_tokens": limit,
                "temperature": request.temperature,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "logprobs": 0,
                "seed": (request.seed + len(sampled)) & 0x7FFFFFFF,
                "stop_token_ids": [self.stop_id],
            },
        }

    async def _post(self, url: str, body: dict[str, Any], timeout_s: float) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=max(timeout_s, 0.1))
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url, data=json.dumps(body), headers=headers, timeout=timeout) as response:
            return response.status, await response.read()

    async def _drop_if_unreachable(self, url: str) -> None:
        try:
            async with self._session.get(url + "/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                healthy = response.status == 200
        except (aiohttp.ClientError, OSError):
            healthy = False
        if not healthy:
            self._drop(url, self._last_failure)

    async def _watch(self, url: str) -> None:
        """Requests of other clients at a server, and of ours that it has not noticed to be over."""
        while url in self._in_flight:
            found = await server_load.num_requests(self._session, url)
            if found is not None:
                self._num_others[url] = max(0, found - self._in_flight.get(url, 0))
            await asyncio.sleep(server_load.PERIOD_S)

    def _server_of(self, trajectory_id: str) -> str:
        url = self._home.get(trajectory_id)
        if url not in self._in_flight:
            # A copy: a push in another thread may take one out meanwhile.
            load = {url: ours + self._num_others[url] for url, ours in dict(self._in_flight).items()}
            url = self._home[trajectory_id] = min(load, key=load.__getitem__)
        return url

    def _drop(self, url: str, problem: str) -> None:
        """Out of rotation: it gets no more work, and no weights."""
        if self._in_flight.pop(url, None) is not None:
            print(f"vLLM at {url} is out of rotation: {problem}", flush=True)
        self._last_failure = problem


def _versions(choice: dict[str, Any]) -> list[int]:
    """The policy version of each token. A server says it in spans, by the names that pushes gave, such as "v12";
    "default" is what it was started with, version 0.
    """
    versions = [0] * len(choice["token_ids"])
    for span in choice["weight_versions"]:
        first, end = span["start"], span["end"]
        number = 0 if span["version"] == "default" else int(span["version"].removeprefix("v"))
        versions[first:end] = [number] * (end - first)
    return versions


def _line(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.decode(errors="replace").split())[:200]

"""The in-process sampler: turns of many trajectories decoded together, their KV cache kept between turns.

Trajectories are admitted in generations of at most `max_rows`. A generation advances in waves: when all of its live
trajectories have asked (or `max_wait_s` has passed), their new tokens are appended and one completion each is decoded.
Siblings' common prompt is prefilled once. Rows that have ended are dropped when a smaller batch suffices.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np

from jorch.config import SamplerConfig
from jorch.model.decode import Cache, Decoder, empty_cache
from jorch.model.transformer import Params, Qwen3
from jorch.types import Completion, CompletionRequest

_SHRINK = 4
"""Factor between batch sizes: few programs to compile, at most this much idle work."""
_MIN_ROWS = 8


@dataclass
class _Row:
    """One live trajectory of the current generation."""

    index: int
    cached_ids: np.ndarray
    request: CompletionRequest | None = None
    answer: asyncio.Future[Completion] | None = None


@dataclass
class SamplerStats:
    """Work since the last reset."""

    busy_s: float = 0.0
    sampled_tokens: int = 0
    waves: int = 0


@dataclass
class JaxSampler:
    """A `Sampler` on this process's devices. `params` may be replaced between steps by `publish`."""

    model: Qwen3
    params: Params
    config: SamplerConfig
    max_tokens: int
    """Bound on the tokens of one completion; part of the compiled program."""
    stop_id: int
    policy_version: int = 0
    stats: SamplerStats = field(default_factory=SamplerStats)

    def __post_init__(self) -> None:
        self.max_context_tokens = self.config.max_context_tokens
        self.decoder = Decoder(self.model, self.max_tokens, self.stop_id)
        self._waiting: dict[str, None] = {}
        self._rows: dict[str, _Row] = {}
        self._early: dict[str, tuple[CompletionRequest, asyncio.Future[Completion]]] = {}
        self._cache: Cache | None = None
        self._batch_rows = 0
        self._slot = 0
        self._timer: asyncio.TimerHandle | None = None
        self._wave: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")

    def publish(self, params: Params, policy_version: int) -> None:
        """Sample from these weights from now on. Call it between steps, when no trajectory is live."""
        assert not self._rows, "weights change only between generations: a cache belongs to its weights"
        self.params, self.policy_version = params, policy_version

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def warm_up(self, append_tokens: int) -> None:
        """Compile the turn of every batch size now, so that no later step stops for it.

        Args:
            append_tokens: expected length of an observation; other lengths compile when they first occur.
        """
        largest, width = self.config.max_rows, _power_of_two(append_tokens)
        sizes = sorted({self._bucket(n) for n in range(1, largest + 1)}, reverse=True)
        for number, size in enumerate(sizes):
            cache = empty_cache(self.model.config, size, self._num_columns())
            nothing = np.zeros((size, width), np.int32)
            for _ in range(2):  # a cache that a program returned is placed otherwise than an empty one: another program
                cache = self.decoder.append(self.params, cache, nothing, nothing > 0)
            none = np.zeros(size, bool)
            cache, _ = self.decoder.decode(self.params, cache, none, np.zeros(size, np.uint32), np.float32(1.0))
            for smaller in sizes[number + 1 :]:
                self.decoder.take_rows(cache, np.zeros(smaller, np.int32))

    def expect(self, trajectory_ids: Sequence[str]) -> None:
        self._waiting.update(dict.fromkeys(trajectory_ids))
        self._admit()

    async def complete(self, request: CompletionRequest) -> Completion:
        assert len(request.prompt_token_ids) + request.max_tokens <= self.max_context_tokens, (
            f"{len(request.prompt_token_ids)} prompt tokens + {request.max_tokens} exceed the context"
        )
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        row = self._rows.get(request.trajectory_id)
        if row is None:
            self._waiting.setdefault(request.trajectory_id)
            self._early[request.trajectory_id] = (request, answer)
            self._admit()
        else:
            row.request, row.answer = request, answer
            self._start_when_ready()
        return await answer

    def release(self, trajectory_id: str) -> None:
        self._waiting.pop(trajectory_id, None)
        self._early.pop(trajectory_id, None)
        self._rows.pop(trajectory_id, None)
        if self._rows:
            self._start_when_ready()
        else:
            self._admit()

    def _admit(self) -> None:
        """Start the next generation once the last one is over."""
        if self._rows or self._wave:
            return
        self._cache = None
        for index, trajectory_id in enumerate(list(self._waiting)[: self.config.max_rows]):
            del self._waiting[trajectory_id]
            row = _Row(index, np.zeros(0, np.int32))
            if trajectory_id in self._early:
                row.request, row.answer = self._early.pop(trajectory_id)
            self._rows[trajectory_id] = row
        self._start_when_ready()

    def _start_when_ready(self) -> None:
        if self._wave or not self._rows:
            return
        # Once per request: siblings ask in row order, so from the end the first row that does not is found at once.
        if all(row.request is not None for row in reversed(self._rows.values())):
            self._start()
        elif self.config.max_wait_s is not None and self._timer is None and self._anyone_asks():
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.config.max_wait_s, self._start)

    def _anyone_asks(self) -> bool:
        return any(row.request is not None for row in self._rows.values())

    def _start(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._wave is None:
            self._wave = asyncio.get_running_loop().create_task(self._run_wave())

    async def _run_wave(self) -> None:
        """Decode one completion for every row that asks, off the event loop, and hand them out together."""
        rows = [row for row in self._rows.values() if row.request is not None]
        try:
            loop, live = asyncio.get_running_loop(), list(self._rows.values())
            completions = await loop.run_in_executor(self._thread, self._decode, rows, live)
        except BaseException as error:
            for row in rows:
                if row.answer and not row.answer.done():
                    row.answer.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._wave = None
        for row, completion in zip(rows, completions, strict=True):
            answer, row.request, row.answer = row.answer, None, None
            if answer and not answer.done():
                answer.set_result(completion)
        if self._rows:
            self._start_when_ready()  # a straggler may have asked in the meantime
        else:
            self._admit()

    def _decode(self, rows: list[_Row], live: list[_Row]) -> list[Completion]:
        began = time.perf_counter()
        [temperature] = {row.request.temperature for row in rows if row.request}
        if self._cache is None:
            self._prefill(rows, live)
        else:
            self._shrink(live)
            self._append_new(rows)
        assert self._cache is not None
        self._make_room(self.max_tokens)
        active = np.zeros(self._batch_rows, bool)
        seeds = np.zeros(self._batch_rows, np.uint32)
        for row in rows:
            assert row.request is not None
            active[row.index] = True
            seeds[row.index] = row.request.seed & 0xFFFFFFFF
        self._cache, sampled = self.decoder.decode(self.params, self._cache, active, seeds, np.float32(temperature))
        token_ids, logprobs, counts = jax.device_get(tuple(sampled))
        self._slot += int(counts.max())
        completions = [self._completion(row, token_ids, logprobs, counts) for row in rows]
        self.stats.busy_s += time.perf_counter() - began
        self.stats.sampled_tokens += int(counts.sum())
        self.stats.waves += 1
        return completions

    def _completion(self, row: _Row, token_ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray) -> Completion:
        assert row.request is not None
        count = min(int(counts[row.index]), row.request.max_tokens)
        ids = token_ids[row.index, :count].copy()
        # Past a request's own limit the cache holds more than was answered: nothing can be appended to such a row.
        row.cached_ids = np.concatenate([row.request.prompt_token_ids, token_ids[row.index, : counts[row.index]]])
        reason = "stop" if count and ids[-1] == self.stop_id else "length"
        return Completion(ids, logprobs[row.index, :count].copy(), reason, self.policy_version)

    def _prefill(self, rows: list[_Row], live: list[_Row]) -> None:
        """A fresh cache: each distinct prompt once, then a row for each trajectory; stragglers' stay empty."""
        for index, row in enumerate(live):  # some may have left without asking
            row.index = index
        prompts: dict[bytes, int] = {}
        for row in rows:
            assert row.request is not None
            prompts.setdefault(row.request.prompt_token_ids.tobytes(), len(prompts))
        unique = [np.frombuffer(key, np.int32) for key in prompts]
        has_stragglers = len(rows) < len(live)
        num_rows = _power_of_two(len(unique) + has_stragglers)
        source = np.full(self._bucket(len(live)), len(unique) if has_stragglers else 0, np.int32)
        for row in rows:
            assert row.request is not None
            source[row.index] = prompts[row.request.prompt_token_ids.tobytes()]
        self._batch_rows = num_rows
        self._slot = 0
        self._cache = empty_cache(self.model.config, num_rows, self._num_columns())
        self._append(dict(enumerate(unique)))
        self._cache = self.decoder.take_rows(self._cache, source)
        self._batch_rows = len(source)

    def _append_new(self, rows: list[_Row]) -> None:
        new: dict[int, np.ndarray] = {}
        for row in rows:
            assert row.request is not None
            prompt, cached = row.request.prompt_token_ids, row.cached_ids
            assert np.array_equal(prompt[: len(cached)], cached), "a prompt must extend its trajectory's tokens"
            new[row.index] = prompt[len(cached) :]
        self._append(new)

    def _append(self, new_ids: dict[int, np.ndarray]) -> None:
        """Append each row's new tokens, right-padded, in blocks of at most `prefill_chunk_tokens`."""
        longest = max(map(len, new_ids.values()), default=0)
        chunk = self.config.prefill_chunk_tokens
        for start in range(0, longest, chunk):
            blocks = {index: ids[start : start + chunk] for index, ids in new_ids.items()}
            width = max(map(len, blocks.values()))
            padded = min(_power_of_two(width), chunk)
            token_ids = np.zeros((self._batch_rows, padded), np.int32)
            ok = np.zeros((self._batch_rows, padded), bool)
            for index, ids in blocks.items():
                token_ids[index, : len(ids)] = ids
                ok[index, : len(ids)] = True
            self._make_room(padded)
            self._cache = self.decoder.append(self.params, self._cache, token_ids, ok)
            self._slot += width

    def _make_room(self, num_columns: int) -> None:
        if self._slot + num_columns > self._num_columns():
            assert self._cache is not None
            cache: Cache = self.decoder.compact(self._cache)
            self._cache, self._slot = cache, int(cache.slot)
        assert self._slot + num_columns <= self._num_columns(), "the context bound keeps rows within the cache"

    def _num_columns(self) -> int:
        # Padding of the last block may reach past the longest row.
        return self.max_context_tokens + self.config.prefill_chunk_tokens + self.max_tokens

    def _shrink(self, live: list[_Row]) -> None:
        """Drop ended rows where a smaller batch holds the live ones."""
        size = self._bucket(len(live))
        if size >= self._batch_rows:
            return
        kept = np.zeros(size, np.int32)
        for new_index, row in enumerate(live):
            kept[new_index], row.index = row.index, new_index
        self._cache = self.decoder.take_rows(self._cache, kept)
        self._batch_rows = size

    def _bucket(self, num_rows: int) -> int:
        """The smallest compiled batch size that holds `num_rows`."""
        size = self.config.max_rows
        while size // _SHRINK >= max(num_rows, _MIN_ROWS):
            size //= _SHRINK
        return size


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()

"""The in-process sampler: turns of many trajectories decoded together, their KV cache kept between turns.

Trajectories are dealt to lanes, which decode side by side, each by a thread of its own: while one waits for tools the
others compute. A lane admits its trajectories in generations and advances in waves: when all of its live ones have
asked (or `max_wait_s` has passed), their new tokens are appended and one completion each is decoded.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import InitVar, dataclass, field

import numpy as np

from jorch.model.decode import Decoder
from jorch.model.transformer import Params, Qwen3
from jorch.rollout.row_batch import RowBatch
from jorch.rollout.stats import SamplerStats
from jorch.sections import SamplerConfig
from jorch.types import Completion, CompletionRequest


@dataclass
class JaxSampler:
    """A `Sampler` on this process's devices.

    New weights take effect at each lane's next wave. Trajectories under way go on with the keys and values that earlier
    weights computed; what a token was really drawn with is what its log-probability says.
    """

    model: Qwen3
    params: InitVar[Params]
    config: SamplerConfig
    max_tokens: int
    """Bound on the tokens of one completion; part of the compiled program."""
    stop_id: int
    batches: int = 1
    """Announced batches that may be under way side by side, each in `config.lanes` lanes of its own."""
    policy_version: int = 0
    stats: SamplerStats = field(default_factory=SamplerStats)
    takes_adapters: bool = False

    def __post_init__(self, params: Params) -> None:
        self.max_context_tokens = self.config.max_context_tokens
        self.decoder = Decoder(self.model, self.max_tokens, self.stop_id)
        self.current = (self.decoder.prepare(params), self.policy_version)
        self.lane_rows = -(-self.config.max_rows // self.config.lanes)
        self._lanes = [_Lane(self, self._new_batch()) for _ in range(self.config.lanes * self.batches)]
        self._lane_of: dict[str, _Lane] = {}
        self.threads = ThreadPoolExecutor(self.config.lanes, thread_name_prefix="sampler")

    def publish(self, params: Params, policy_version: int) -> None:
        """Sample from these weights from the next waves on. May be called from another thread."""
        self.current = (self.decoder.prepare(params), policy_version)  # one assignment: waves read it in their threads
        self.policy_version = policy_version

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    def warm_up(self, append_tokens: int) -> None:
        """Compile the turn of every batch size now, so that no later step stops for it.

        Args:
            append_tokens: expected length of an observation; other lengths compile when they first occur.
        """
        self._new_batch().warm_up(self.current[0], append_tokens)

    def connected(self) -> AbstractAsyncContextManager[object]:
        return nullcontext()

    def expect(self, trajectory_ids: Sequence[str]) -> None:
        """Dealt by their number alone, so that the same run makes the same batches; siblings stay together.

        Idle lanes come first: one that is at work admits nobody before its generation is over.
        """
        lanes = [lane for lane in self._lanes if lane.is_idle][: self.config.lanes] or self._lanes
        share = max(1, min(self.lane_rows, -(-len(trajectory_ids) // len(lanes))))
        for number, trajectory_id in enumerate(trajectory_ids):
            lane = lanes[number // share % len(lanes)]
            self._lane_of[trajectory_id] = lane
            lane.waiting.setdefault(trajectory_id)
        for lane in self._lanes:
            lane.advance()

    async def complete(self, request: CompletionRequest) -> Completion:
        assert len(request.prompt_token_ids) + self.max_tokens <= self.max_context_tokens, (
            f"{len(request.prompt_token_ids)} prompt tokens + {self.max_tokens} exceed the context"
        )
        assert request.max_tokens <= self.max_tokens
        lane = self._lane_of.get(request.trajectory_id)
        if lane is None:
            lane = min(self._lanes, key=lambda lane: len(lane.rows) + len(lane.waiting))
            self._lane_of[request.trajectory_id] = lane
            lane.waiting.setdefault(request.trajectory_id)
        answer = lane.ask(request)
        lane.advance()
        return await answer

    def release(self, trajectory_id: str) -> None:
        lane = self._lane_of.pop(trajectory_id, None)
        if lane is not None:
            lane.release(trajectory_id)
            lane.advance()

    def _new_batch(self) -> RowBatch:
        return RowBatch(
            self.decoder,
            max_rows=self.lane_rows,
            max_context_tokens=self.max_context_tokens,
            chunk_tokens=self.config.prefill_chunk_tokens,
        )


@dataclass
class _Row:
    """One live trajectory of a lane's current generation."""

    index: int
    cached_ids: np.ndarray
    request: CompletionRequest | None = None
    answer: asyncio.Future[Completion] | None = None


class _Lane:
    """The trajectories of one lane: who waits for the next generation, who is live in this one, and the next wave."""

    def __init__(self, sampler: JaxSampler, batch: RowBatch) -> None:
        self.waiting: dict[str, None] = {}
        self.rows: dict[str, _Row] = {}
        self._sampler = sampler
        self._batch = batch
        self._early: dict[str, tuple[CompletionRequest, asyncio.Future[Completion]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wave: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        return not (self.rows or self.waiting or self._wave)

    def ask(self, request: CompletionRequest) -> asyncio.Future[Completion]:
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        row = self.rows.get(request.trajectory_id)
        if row is None:
            self._early[request.trajectory_id] = (request, answer)
        else:
            row.request, row.answer = request, answer
        return answer

    def release(self, trajectory_id: str) -> None:
        self.waiting.pop(trajectory_id, None)
        self._early.pop(trajectory_id, None)
        self.rows.pop(trajectory_id, None)

    def advance(self) -> None:
        """Start the next generation once the last one is over, and the next wave once everybody has asked."""
        if self._wave:
            return
        if not self.rows:
            self._admit()
        # Once per request: siblings ask in row order, so from the end the first row that does not is found at once.
        if self.rows and all(row.request is not None for row in reversed(self.rows.values())):
            self._start()
        elif self._sampler.config.max_wait_s is not None and self._timer is None and self._anyone_asks():
            self._timer = asyncio.get_running_loop().call_later(self._sampler.config.max_wait_s, self._start)

    def _admit(self) -> None:
        self._batch.clear()
        for index, trajectory_id in enumerate(list(self.waiting)[: self._sampler.lane_rows]):
            del self.waiting[trajectory_id]
            row = _Row(index, np.zeros(0, np.int32))
            if trajectory_id in self._early:
                row.request, row.answer = self._early.pop(trajectory_id)
            self.rows[trajectory_id] = row

    def _anyone_asks(self) -> bool:
        return any(row.request is not None for row in self.rows.values())

    def _start(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._wave is None:
            self._wave = asyncio.get_running_loop().create_task(self._run_wave())

    async def _run_wave(self) -> None:
        """Decode one completion for every row that asks, off the event loop, and hand them out together."""
        rows = [row for row in self.rows.values() if row.request is not None]
        try:
            loop, live = asyncio.get_running_loop(), list(self.rows.values())
            completions = await loop.run_in_executor(self._sampler.threads, self._decode, rows, live)
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
        self.advance()  # a straggler may have asked in the meantime

    def _decode(self, rows: list[_Row], live: list[_Row]) -> list[Completion]:
        with self._sampler.stats.wave():
            (weights, version), batch = self._sampler.current, self._batch
            requests = [row.request for row in rows if row.request]
            [temperature] = {request.temperature for request in requests}
            anew = batch.is_empty or not all(map(_extends_cache, rows))
            if anew or batch.shrink([row.index for row in live]):
                for index, row in enumerate(live):
                    row.index = index
            if anew:
                batch.prefill(
                    weights, [row.request.prompt_token_ids if row.request else row.cached_ids for row in live]
                )
            else:
                batch.append(weights, {row.index: _new_tokens(row) for row in rows})
            turns = {row.index: (r.max_tokens, r.seed) for row, r in zip(rows, requests, strict=True)}
            sampled = batch.decode(weights, turns, temperature)
        self._sampler.stats.count(sum(len(ids) for ids, _ in sampled.values()))
        return [
            self._completion(row, request, *sampled[row.index], version)
            for row, request in zip(rows, requests, strict=True)
        ]

    def _completion(
        self, row: _Row, request: CompletionRequest, ids: np.ndarray, logprobs: np.ndarray, version: int
    ) -> Completion:
        row.cached_ids = np.concatenate([request.prompt_token_ids, ids])
        reason = "stop" if len(ids) and ids[-1] == self._sampler.stop_id else "length"
        return Completion(ids, logprobs, reason, np.full(len(ids), version, np.int32))


def _extends_cache(row: _Row) -> bool:
    assert row.request is not None
    return np.array_equal(row.request.prompt_token_ids[: len(row.cached_ids)], row.cached_ids)


def _new_tokens(row: _Row) -> np.ndarray:
    """What the request's prompt adds to the tokens in the cache."""
    assert row.request is not None
    return row.request.prompt_token_ids[len(row.cached_ids) :]

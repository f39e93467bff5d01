"""Rows of trajectories on the device: one KV cache, its free columns, and the rows in it. No scheduling happens here.

The cache has as many columns as the context bound. Appends and completions of ragged rows use up columns faster than
any row grows; when they run out the cache is compacted. Of long prompts with siblings the first tokens are kept once
(`decode.share`): as many as all prompts of the batch have, in powers of two, so that few programs are compiled.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jorch.model.decode import Cache, Decoder, Seats
from jorch.model.transformer import Params

_SHRINK = 4
"""Factor between batch sizes: few programs to compile, at most this much idle work."""
_MIN_ROWS = 8
MIN_SHARED = 128
"""Tokens. Fewer gain little, and are not worth programs of their own."""


class RowBatch:
    """Between one and `max_rows` rows that are decoded together; `prefill` begins anew."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_rows: int,
        max_context_tokens: int,
        chunk_tokens: int,
        min_shared: int = MIN_SHARED,
    ) -> None:
        """
        Args:
            chunk_tokens: the longest block appended in one program.
            min_shared: from how many tokens on the beginnings of prompts are kept once for all siblings.
        """
        self._decoder = decoder
        self._max_rows = max_rows
        self._chunk = chunk_tokens
        self._min_shared = min_shared
        self._num_columns = max_context_tokens
        self._cache: Cache | None = None
        self._num_rows = 0
        self._slot = 0  # the cache's own, known without waiting for the device
        self._num_shared = 0

    @property
    def num_bytes(self) -> int:
        """Of the cache on the device, once what has been asked of it is done."""
        return sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(self._cache)))

    @property
    def is_empty(self) -> bool:
        return self._cache is None

    def clear(self) -> None:
        self._cache = None

    def warm_up(self, weights: Params, append_tokens: int) -> None:
        """Compile the turn of every batch size; `append_tokens` is the length of an observation."""
        width = min(_power_of_two(append_tokens), self._chunk)
        sizes = sorted({self._bucket(n) for n in range(1, self._max_rows + 1)}, reverse=True)
        for number, size in enumerate(sizes):
            cache = self._decoder.empty(size, self._num_columns)
            nothing = np.zeros((size, width), np.int32)
            for _ in range(2):  # a cache that a program returned is placed otherwise than an empty one: another program
                cache = self._decoder.append(weights, cache, nothing, nothing > 0)
            limits, seeds = np.zeros(size, np.int32), np.zeros(size, np.uint32)
            cache, _ = self._decoder.decode(weights, cache, limits, seeds, np.float32(1.0))
            for smaller in sizes[number + 1 :]:
                self._decoder.take_rows(cache, np.zeros(smaller, np.int32))

    def prefill(self, weights: Params, prompts: Sequence[np.ndarray | None]) -> None:
        """A fresh cache with a row per prompt, i32[n] each; None leaves its row empty. Each distinct one runs once."""
        numbers: dict[bytes, int] = {}
        for prompt in prompts:
            numbers.setdefault(b"" if prompt is None else prompt.tobytes(), len(numbers))
        source = np.zeros(self._bucket(len(prompts)), np.int32)
        source[: len(prompts)] = [numbers[b"" if prompt is None else prompt.tobytes()] for prompt in prompts]
        self._num_rows = _power_of_two(len(numbers))
        self._slot = self._num_shared = 0
        self._cache = self._decoder.empty(self._num_rows, self._num_columns)
        distinct = {number: np.frombuffer(key, np.int32) for key, number in numbers.items()}
        self.append(weights, distinct)
        num_shared = _largest_power_of_two(min(map(len, distinct.values())))
        if num_shared >= self._min_shared and len(prompts) > len(distinct):
            seats = _seats(source[: len(prompts)], self._num_rows, len(source))
            self._cache = self._decoder.share(self._cache, source, seats, num_shared)
            self._num_shared = num_shared
            self._slot -= num_shared
        else:
            self._cache = self._decoder.take_rows(self._cache, source)
        self._num_rows = len(source)

    def append(self, weights: Params, new_ids: Mapping[int, np.ndarray]) -> None:
        """Append each row's new tokens, right-padded, in blocks."""
        done, longest = 0, max(map(len, new_ids.values()), default=0)
        while done < longest:
            width = min(longest - done, self._chunk)
            padded = self._make_room(min(_power_of_two(width), self._chunk))
            token_ids = np.zeros((self._num_rows, padded), np.int32)
            ok = np.zeros((self._num_rows, padded), bool)
            for row, ids in new_ids.items():
                block = ids[done : done + padded]
                token_ids[row, : len(block)] = block
                ok[row, : len(block)] = True
            self._cache = self._decoder.append(weights, self._cache, token_ids, ok)
            self._slot += min(width, padded)
            done += padded

    def decode(
        self, weights: Params, turns: Mapping[int, tuple[int, int]], temperature: float
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Complete each row in `turns`, given by its (limit in tokens, seed): token ids i32[n], logprobs f32[n]."""
        self._make_room(self._decoder.max_tokens)
        limits, seeds = np.zeros(self._num_rows, np.int32), np.zeros(self._num_rows, np.uint32)
        for row, (limit, seed) in turns.items():
            limits[row], seeds[row] = limit, seed & 0xFFFFFFFF
        self._cache, sampled = self._decoder.decode(weights, self._cache, limits, seeds, np.float32(temperature))
        token_ids, logprobs, counts = jax.device_get(tuple(sampled))
        self._slot += int(counts.max())
        return {row: (token_ids[row, : counts[row]].copy(), logprobs[row, : counts[row]].copy()) for row in turns}

    def shrink(self, kept: Sequence[int]) -> bool:
        """Keep these rows only, in this order, if a smaller batch holds them; whether it did."""
        size = self._bucket(len(kept))
        if size >= self._num_rows:
            return False
        rows = np.zeros(size, np.int32)
        rows[: len(kept)] = kept
        self._cache = self._decoder.take_rows(self._cache, rows)
        self._num_rows = size
        return True

    def _make_room(self, wanted: int) -> int:
        """Free columns for the next block: `wanted`, or the largest power of two that a compacted cache has left."""
        num_columns = self._num_columns - self._num_shared
        if self._slot + wanted > num_columns:
            # A row within a completion of the bound can be asked nothing more.
            longest = np.int32(self._num_columns - self._decoder.max_tokens)
            cache: Cache = self._decoder.compact(self._cache, longest)
            self._cache, self._slot = cache, int(cache.slot)
        free = num_columns - self._slot
        assert free >= min(wanted, self._decoder.max_tokens), "the context bound keeps rows within the cache"
        return wanted if wanted <= free else 1 << (free.bit_length() - 1)

    def _bucket(self, num_rows: int) -> int:
        """The smallest compiled batch size that holds `num_rows`."""
        size = self._max_rows
        while size // _SHRINK >= max(num_rows, _MIN_ROWS):
            size //= _SHRINK
        return size


def _seats(prompt_of: np.ndarray, num_prompts: int, num_rows: int) -> Seats:
    """Seats of the first rows beside the others with their prompt; rows that wait for none share the first seat."""
    num_seats = int(np.bincount(prompt_of).max())
    row_PR, seat_B = np.zeros((num_prompts, num_seats), np.int32), np.zeros(num_rows, np.int32)
    taken = np.zeros(num_prompts, np.int32)
    for row, prompt in enumerate(prompt_of):
        row_PR[prompt, taken[prompt]] = row
        seat_B[row] = prompt * num_seats + taken[prompt]
        taken[prompt] += 1
    return Seats(row_PR, seat_B)


def _power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _largest_power_of_two(number: int) -> int:
    """The largest that is not above `number`; 0 of 0."""
    return 1 << number.bit_length() - 1 if number else 0

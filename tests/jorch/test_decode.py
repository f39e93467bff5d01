"""Decoding with a cache against the float64 model without one (conftest.py), whatever was done to the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jorch.model.decode import Decoder, empty_cache
from jorch.model.transformer import Qwen3

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, COLUMNS, BLOCK, MAX_TOKENS, STOP_ID = 4, 48, 4, 3, 9
# Float32 against float64 through two layers, logits up to about 10.
ATOL = 2e-4
seeded = settings(derandomize=True, deadline=None, max_examples=15)


@functools.cache
def decoder_of(model):
    return Decoder(model, MAX_TOKENS, STOP_ID)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Rows:
    """A cache beside the tokens that it should hold."""

    def __init__(self, model, params, qwen3_logits, num_rows=ROWS):
        self.model, self.params = model, params
        self.decoder = decoder_of(model)
        self.weights = self.decoder.prepare(params)
        self.oracle = lambda token_ids: qwen3_logits(params, model.config, np.array(token_ids))
        self.cache = empty_cache(model.config, num_rows, COLUMNS)
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]

    def append(self, blocks):
        """One block of at most BLOCK tokens a row, right-padded."""
        token_ids = np.zeros((len(blocks), BLOCK), np.int32)
        ok = np.zeros((len(blocks), BLOCK), bool)
        for row, block in enumerate(blocks):
            token_ids[row, : len(block)] = block
            ok[row, : len(block)] = True
            self.tokens[row] += block
        self.cache = self.decoder.append(self.weights, self.cache, token_ids, ok)

    def decode(self, active, seeds=None, temperature=0.0):
        """Sampled tokens per row; they join the rows' own, and each was the likeliest if the temperature is 0."""
        seeds = np.zeros(len(active), np.uint32) if seeds is None else seeds
        self.cache, sampled = self.decoder.decode(
            self.weights, self.cache, np.where(active, MAX_TOKENS, 0).astype(np.int32), seeds, np.float32(temperature)
        )
        token_ids, logprobs, counts = map(np.asarray, sampled)
        for row, is_active in enumerate(active):
            ids = token_ids[row, : counts[row]].tolist()
            assert (counts[row] > 0) == is_active
            if is_active:
                assert STOP_ID not in ids[:-1]
                assert ids[-1] == STOP_ID or counts[row] == MAX_TOKENS
                logits = self.oracle(self.tokens[row] + ids)[len(self.tokens[row]) - 1 : -1]
                self.check_sampled(logits, ids, logprobs[row, : counts[row]], temperature)
            self.tokens[row] += ids
        return token_ids, logprobs, counts

    def check_sampled(self, logits, ids, logprobs, temperature):
        chosen = logits[np.arange(len(ids)), ids]
        if temperature == 0:
            np.testing.assert_array_less(logits.max(-1) - ATOL, chosen)
        expected = log_softmax(logits / (temperature or 1.0))[np.arange(len(ids)), ids]
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=ATOL)

    def compact(self):
        self.cache = self.decoder.compact(self.cache, np.int32(COLUMNS))
        assert int(self.cache.slot) == max(map(len, self.tokens))

    def take(self, rows):
        self.cache = self.decoder.take_rows(self.cache, np.array(rows, np.int32))
        self.tokens = [list(self.tokens[row]) for row in rows]

    def check(self):
        """Positions and the next token's logits of every row."""
        assert np.asarray(self.cache.num_tokens).tolist() == [len(tokens) for tokens in self.tokens]
        assert int(self.cache.slot) <= COLUMNS
        logits = np.asarray(self.model.bind(self.params).logits(self.cache.hidden_BD))
        for row, tokens in enumerate(self.tokens):
            if tokens:
                np.testing.assert_allclose(logits[row], self.oracle(tokens)[-1], rtol=0, atol=ATOL)


token_ids = st.integers(0, 63)
blocks = st.lists(st.lists(token_ids, max_size=BLOCK), min_size=ROWS, max_size=ROWS)
operations = st.one_of(
    st.tuples(st.just("append"), blocks.filter(any)),
    st.tuples(st.just("decode"), st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).filter(any)),
    st.tuples(st.just("take"), st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("compact"), st.none()),
)


@given(
    prompts=st.lists(st.lists(token_ids, min_size=1, max_size=BLOCK), min_size=ROWS, max_size=ROWS),
    steps=st.lists(operations, max_size=6),
)
@seeded
def test_any_history_of_a_cache_equals_no_cache(prompts, steps, tiny, qwen3_logits):
    """Ragged appends, greedy turns of some rows, rows dropped and repeated, columns compacted, in any order."""
    rows = Rows(*tiny, qwen3_logits)
    rows.append(prompts)
    for name, argument in steps:
        if name == "compact":
            rows.compact()
        else:
            getattr(rows, name)(argument)
    rows.check()


def test_a_full_cache_goes_on_after_compaction(tiny, qwen3_logits):
    """One row at a time: the columns run out long before any row is long."""
    rows = Rows(*tiny, qwen3_logits)
    for turn in range(COLUMNS // BLOCK):
        rows.append([[turn, 5, 7, 1] if row == turn % ROWS else [] for row in range(ROWS)])
    assert int(rows.cache.slot) == COLUMNS
    rows.compact()
    assert int(rows.cache.slot) == COLUMNS // ROWS
    rows.append([[3], [], [4, 4], [6, 1, 2]])
    rows.decode([True, False, True, True])
    rows.check()


def test_a_smaller_batch_goes_on(tiny, qwen3_logits):
    rows = Rows(*tiny, qwen3_logits)
    rows.append([[1, 2], [3], [4, 5, 6], [7]])
    rows.take([2, 0])
    rows.append([[8], [9, 10]])
    rows.decode([True, True])
    rows.check()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_softmax(temperature, tiny, qwen3_logits):
    """Pearson's statistic of 4096 draws of one token lies within 5 standard deviations of its mean."""
    model, params = tiny
    num_rows = 1024
    rows = Rows(model, params, qwen3_logits, num_rows=1)
    rows.append([[1, 2, 3]])
    rows.take([0] * num_rows)
    counts = np.zeros(64)
    for batch in range(4):
        seeds = np.arange(batch * num_rows, (batch + 1) * num_rows, dtype=np.uint32)
        cache = jax.tree.map(jnp.copy, rows.cache)  # decode donates it
        _, sampled = rows.decoder.decode(
            rows.weights, cache, np.ones(num_rows, np.int32), seeds, np.float32(temperature)
        )
        counts += np.bincount(np.asarray(sampled.token_ids)[:, 0], minlength=64)
    logprobs = log_softmax(rows.oracle([1, 2, 3])[-1] / temperature)
    expected = counts.sum() * np.exp(logprobs)
    frequent = expected >= 5
    counts = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(expected[frequent], expected[~frequent].sum())
    assert len(counts) > 8, "hardly anything to compare"
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_noise_belongs_to_seed_and_position_alone(tiny, qwen3_logits):
    """The same row draws the same tokens in another place, beside other rows; another seed draws others."""
    seeds = np.array([11, 12, 13, 14], np.uint32)
    prompts = [[1, 2], [3, 4, 5], [6], [7, 8]]
    rows = Rows(*tiny, qwen3_logits)
    rows.append(prompts)
    drawn, *_ = rows.decode([True] * 4, seeds, 1.0)
    moved = Rows(*tiny, qwen3_logits)
    moved.append([prompts[3], [60, 61], prompts[0], [62]])
    drawn_again, *_ = moved.decode([True, False, True, True], seeds[[3, 1, 0, 2]], 1.0)
    np.testing.assert_array_equal(drawn_again[[2, 0]], drawn[[0, 3]])
    same_prompt = Rows(*tiny, qwen3_logits)
    same_prompt.append([[1, 2]] * 4)
    others, *_ = same_prompt.decode([True] * 4, seeds, 1.0)
    assert len({tuple(row) for row in others.tolist()}) > 1


def test_float32_logits_over_a_bfloat16_cache(tiny_config, random_params):
    model = Qwen3(tiny_config(compute_dtype="bfloat16", logit_dtype="float32"))
    params = random_params(model)
    decoder = Decoder(model, MAX_TOKENS, STOP_ID)
    weights, cache = decoder.prepare(params), empty_cache(model.config, 1, COLUMNS)
    cache = decoder.append(weights, cache, np.array([[3, 4, 5, 0]], np.int32), np.array([[True, True, True, False]]))
    hidden_BD = np.asarray(cache.hidden_BD, np.float64)
    _, sampled = decoder.decode(weights, cache, np.array([1], np.int32), np.zeros(1, np.uint32), np.float32(0.0))
    expected_BV = log_softmax(hidden_BD @ np.asarray(params["embed"], np.float64).T)
    assert sampled.token_ids[0, 0] == expected_BV.argmax()
    assert float(sampled.logprobs[0, 0]) == pytest.approx(expected_BV.max(), abs=1e-5)

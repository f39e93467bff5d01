"""Packing against what it means: every token keeps its value, its weight, its position and its own past."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jorch.data.packing import fill_fraction, pack
from jorch.types import Sample

ROW_TOKENS = 16
seeded = settings(derandomize=True, deadline=None)


@st.composite
def sample_lists(draw) -> list[Sample]:
    """Up to 12 samples over few prompts and few token values, so that prompts coincide and nest."""
    prompts = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4))
    samples = []
    for _ in range(draw(st.integers(0, 12))):
        prompt = draw(st.sampled_from(prompts))
        tail = draw(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=10))
        mask = [False] * len(prompt) + [True] + [trained for _, trained in tail[1:]]
        ids = prompt + [token for token, _ in tail]
        logprobs = np.where(mask, -np.arange(len(ids)) / 8, 0).astype(np.float32)
        advantage, copies = draw(st.sampled_from([-1.0, 0.5])), draw(st.integers(1, 3))
        samples.append(Sample(np.array(ids, np.int32), np.array(mask), logprobs, advantage, copies))
    return samples


def pack_all(samples, row_tokens=ROW_TOKENS, micro_rows=2):
    return pack(samples, row_tokens=row_tokens, micro_rows=micro_rows, num_micro=-(-len(samples) // micro_rows) or 1)


def rows_of(batch):
    """Each row as a PackedBatch of fields [T]."""
    num_micro, micro_rows, _ = batch.token_ids.shape
    return [type(batch)(*(field[m, b] for field in batch)) for m in range(num_micro) for b in range(micro_rows)]


def ancestors(row, t: int) -> list[int]:
    chain = [t]
    while row.parents[chain[-1]] >= 0:
        chain.append(int(row.parents[chain[-1]]))
    return chain[::-1]


def unpack(batch) -> list[tuple]:
    """Samples read back by following `parents` from the last token of every trained segment."""
    found = []
    for row in rows_of(batch):
        for segment in set(row.segment_ids.tolist()) - {0}:
            where = np.flatnonzero(row.segment_ids == segment)
            if row.loss_weights[where].any():
                found.append(describe(row, ancestors(row, int(where[-1]))))
    return sorted(found)


def describe(row, chain: list[int]) -> tuple:
    weights = row.loss_weights[chain]
    trained = weights > 0
    return (
        tuple(row.token_ids[chain].tolist()),
        tuple(weights.tolist()),
        tuple(np.where(trained, row.advantages[chain], 0).tolist()),
        tuple(np.where(trained, row.sampler_logprobs[chain], 0).tolist()),
    )


def expected(samples) -> list[tuple]:
    return sorted(
        (
            tuple(s.token_ids.tolist()),
            tuple((s.loss_mask * float(s.num_copies)).tolist()),
            tuple((s.loss_mask * s.advantage).tolist()),
            tuple(s.logprobs.tolist()),
        )
        for s in samples
    )


@given(samples=sample_lists())
@seeded
def test_no_sample_is_lost_or_changed(samples):
    batch = pack_all(samples)
    assert unpack(batch) == expected(samples)
    np.testing.assert_array_equal(batch.old_logprobs, batch.sampler_logprobs)
    assert not batch.ref_logprobs.any()


@given(samples=sample_lists())
@seeded
def test_every_token_sees_exactly_its_own_past(samples):
    for row in rows_of(pack_all(samples)):
        for q in np.flatnonzero(row.segment_ids):
            past = ancestors(row, int(q))
            visible = [k for k in range(q + 1) if q < row.visible_until[k]]
            assert visible == past
            assert row.positions[past].tolist() == list(range(len(past)))


@given(samples=sample_lists())
@seeded
def test_padding_lies_at_the_end_and_is_blank(samples):
    batch = pack_all(samples)
    for row in rows_of(batch):
        held = row.segment_ids > 0
        assert held.tolist() == sorted(held.tolist(), reverse=True)
        assert (row.parents[~held] == -1).all()
        for field in row._replace(parents=row.parents * 0):
            assert not field[~held].any()
    used = (batch.segment_ids > 0).any(-1).ravel()
    assert used.tolist() == sorted(used.tolist(), reverse=True)


@given(samples=sample_lists())
@seeded
def test_a_row_holds_one_copy_of_a_prompt(samples):
    for row in rows_of(pack_all(samples)):
        prompts = []
        for segment in set(row.segment_ids.tolist()) - {0}:
            where = np.flatnonzero(row.segment_ids == segment)
            if not row.loss_weights[where].any():
                prompts.append(tuple(row.token_ids[where].tolist()))
        assert len(prompts) == len(set(prompts))


def test_docstring_example():
    def sample(tail):
        return Sample(np.array([5, 6, *tail], np.int32), np.arange(4) >= 2, np.zeros(4, np.float32), 0.5)

    batch = pack([sample([9, 2]), sample([7, 2])], row_tokens=7, micro_rows=1, num_micro=2)
    got = {name: field[0, 0].tolist() for name, field in batch._asdict().items()}
    assert got["token_ids"] == [5, 6, 9, 2, 7, 2, 0]
    assert got["positions"] == [0, 1, 2, 3, 2, 3, 0]
    assert got["segment_ids"] == [1, 1, 2, 2, 3, 3, 0]
    assert got["parents"] == [-1, 0, 1, 2, 1, 4, -1]
    assert got["visible_until"] == [6, 6, 4, 4, 6, 6, 0]
    assert got["loss_weights"] == [0, 0, 1, 1, 1, 1, 0]
    assert not batch.segment_ids[1].any()
    assert fill_fraction(batch) == pytest.approx(6 / 7)


def random_samples(num_prompts: int, siblings: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_prompts):
        prompt = rng.integers(0, 300, rng.integers(44, 60))
        for _ in range(siblings):
            ids = np.concatenate([prompt, rng.integers(0, 300, rng.integers(4, 25))]).astype(np.int32)
            mask = np.arange(len(ids)) >= len(prompt)
            samples.append(Sample(ids, mask, np.where(mask, -0.5, 0).astype(np.float32), 1.0))
    return samples


@pytest.mark.parametrize(("siblings", "row_tokens"), [(1, 256), (4, 256), (16, 384), (16, 1024)])
def test_near_the_fewest_rows_possible(siblings, row_tokens):
    samples = random_samples(512 // siblings, siblings)
    batch = pack(samples, row_tokens=row_tokens, micro_rows=1, num_micro=len(samples))
    prompt_tokens = {s.token_ids[: s.prompt_length].tobytes(): s.prompt_length for s in samples}
    least_tokens = sum(prompt_tokens.values()) + sum(len(s.token_ids) - s.prompt_length for s in samples)
    # The bound is out of reach: it lets rows end anywhere and has one copy of a prompt for all rows.
    assert (batch.segment_ids > 0).any((1, 2)).sum() <= 1.2 * least_tokens / row_tokens + 1


def test_same_input_same_batch():
    samples = random_samples(8, 4)
    for one, two in zip(pack_all(samples, 256), pack_all(samples, 256), strict=True):
        np.testing.assert_array_equal(one, two)


def test_no_samples_is_an_empty_batch():
    batch = pack([], row_tokens=8, micro_rows=2, num_micro=3)
    assert batch.token_ids.shape == (3, 2, 8)
    assert not batch.segment_ids.any()
    assert fill_fraction(batch) == 1.0


def test_a_sample_longer_than_a_row_names_the_key():
    (sample,) = random_samples(1, 1)
    length = len(sample.token_ids)
    with pytest.raises(ValueError, match=rf"{length} tokens.*batch\.row_tokens={length - 1} to at least {length}"):
        pack([sample], row_tokens=length - 1, micro_rows=1, num_micro=1)


def test_too_many_rows_is_our_own_mistake():
    with pytest.raises(AssertionError, match="2 rows needed, the batch has 1"):
        pack(random_samples(2, 1), row_tokens=84, micro_rows=1, num_micro=1)


@pytest.mark.parametrize("mask", [[True, True], [False, False]])
def test_a_sample_must_train_a_token_that_has_a_past(mask):
    sample = Sample(np.array([1, 2], np.int32), np.array(mask), np.zeros(2, np.float32), 1.0)
    with pytest.raises(AssertionError):
        pack_all([sample])

"""Attention over caches, against float64 NumPy that gives each row its whole past."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.decode.api import Seats, cascade_attention, decode_attention, merge

P, R, O, S, C, N, K, H = 2, 3, 2, 6, 5, 4, 2, 4  # noqa: E741
B, SCALE = P * R, H**-0.5
ATOL = 1e-5  # some ten float32 roundings of sums of size about 1
seeded = settings(derandomize=True, deadline=None, max_examples=50)

run = jax.jit(lambda *args: cascade_attention(*args, scale=SCALE))
run_plain = jax.jit(lambda *args: decode_attention(*args, scale=SCALE))


def draw(seed):
    """q, the rows' keys and values, the prompts' keys and values, in the caches' layouts."""
    rng = np.random.default_rng(seed)
    shapes = (B, O, N, H), (B, K, H, S), (B, K, S, H), (P, K, H, C), (P, K, C, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def oracle(q, k, v, k_prompt, v_prompt, visible, prompt_tokens):
    """Each token alone over the concatenation of what it sees."""
    o, lse = np.zeros((B, O, N, H)), np.full((B, O, N), -np.inf)
    for b, t, n in np.ndindex(B, O, N):
        p, head = b // R, n // (N // K)
        filled, seen = prompt_tokens[p], np.flatnonzero(visible[b, t])
        keys = np.concatenate([k_prompt[p, head].T[:filled], k[b, head].T[seen]]).astype(np.float64)
        values = np.concatenate([v_prompt[p, head][:filled], v[b, head][seen]]).astype(np.float64)
        if len(keys):
            weights = np.exp(SCALE * keys @ q[b, t, n].astype(np.float64))
            o[b, t, n], lse[b, t, n] = weights @ values / weights.sum(), np.log(weights.sum())
    return o, lse


@given(seed=st.integers(0, 2**16), prompt_tokens=st.lists(st.integers(0, C), min_size=P, max_size=P), data=st.data())
@seeded
def test_the_cascade_is_attention_over_the_whole_past(seed, prompt_tokens, data):
    """Prompts of any length, none too; rows with holes, and rows that see nothing at all."""
    q, k, v, k_prompt, v_prompt = draw(seed)
    bits = data.draw(st.integers(0, 2 ** (B * O * S) - 1))
    visible = np.array([bits >> i & 1 for i in range(B * O * S)], bool).reshape(B, O, S)
    filled = np.array(prompt_tokens, np.int32)
    expected_o, expected_lse = oracle(q, k, v, k_prompt, v_prompt, visible, filled)
    o, lse = run(q, k, v, visible, k_prompt, v_prompt, filled)
    np.testing.assert_allclose(o, expected_o, rtol=0, atol=ATOL)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=ATOL)
    # The same columns in one cache per row: the plain path, which copies the prompt for each sibling.
    whole_k = np.concatenate([k_prompt.repeat(R, 0), k], axis=3)
    whole_v = np.concatenate([v_prompt.repeat(R, 0), v], axis=2)
    prompt_part = np.broadcast_to((np.arange(C) < filled.repeat(R)[:, None])[:, None], (B, O, C))
    plain_o, plain_lse = run_plain(q, whole_k, whole_v, np.concatenate([prompt_part, visible], axis=2))
    np.testing.assert_allclose(o, plain_o, rtol=0, atol=ATOL)
    np.testing.assert_allclose(lse, plain_lse, rtol=0, atol=ATOL)


@given(seed=st.integers(0, 2**16), order=st.permutations(range(B)), lost=st.integers(0, B - 1))
@seeded
def test_rows_in_any_order_find_their_prompt_by_their_seats(seed, order, lost):
    """And a seat whose row has left is nobody's."""
    q, k, v, k_prompt, v_prompt = draw(seed)
    visible, filled = np.ones((B, O, S), bool), np.full(P, C, np.int32)
    expected = run(q, k, v, visible, k_prompt, v_prompt, filled)
    seat_B = np.array([row for row in order if row != lost], np.int32)
    row_PR = np.zeros(B, np.int32)
    row_PR[seat_B] = np.arange(B - 1)
    seats = Seats(row_PR.reshape(P, R), seat_B)
    found = run(*(x[seat_B] for x in (q, k, v, visible)), k_prompt, v_prompt, filled, seats)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole[seat_B], rtol=0, atol=ATOL)


def test_large_scores_do_not_overflow_in_the_merge():
    q, k, v, k_prompt, v_prompt = draw(1)
    visible, filled = np.ones((B, O, S), bool), np.full(P, C, np.int32)
    o, lse = run(1e4 * q, k, v, visible, k_prompt, v_prompt, filled)
    assert np.isfinite(np.asarray(o)).all()
    # The softmax is an argmax there.
    keys = np.concatenate([k_prompt.repeat(R, 0), k], axis=3)
    values = np.concatenate([v_prompt.repeat(R, 0), v], axis=2)
    for b, t, n in np.ndindex(B, O, N):
        best = (q[b, t, n].astype(np.float64) @ keys[b, n // 2]).argmax()
        np.testing.assert_allclose(np.asarray(o)[b, t, n], values[b, n // 2, best], rtol=0, atol=ATOL)


def test_merge_has_nothing_as_its_neutral_element():
    o, lse = (np.asarray(x) for x in run_plain(*draw(2)[:3], np.ones((B, O, S), bool)))
    nothing = (np.zeros_like(o), np.full_like(lse, -np.inf))
    for merged in (merge((o, lse), nothing), merge(nothing, (o, lse))):
        np.testing.assert_allclose(merged[0], o, rtol=1e-6)
        np.testing.assert_allclose(merged[1], lse, rtol=1e-6)


def test_a_shared_prompt_is_not_copied_for_its_siblings():
    """No array of the compiled program has a prompt's keys once for each row."""
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(0)]
    q, k, v, k_prompt, v_prompt = arguments
    visible, filled = jax.ShapeDtypeStruct((B, O, S), bool), jax.ShapeDtypeStruct((P,), jnp.int32)
    text = run.lower(q, k, v, visible, k_prompt, v_prompt, filled).compile().as_text()
    assert f"[{P},{K},{H},{C}]" in text
    assert not any(f"[{B},{K},{a},{b}]" in text for a, b in ((H, C), (C, H)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (B, K, S, H)}, "the rows' cache must be k"),
        ({"v_prompt": (P, K, C, H + 1)}, "the prompts' cache must be k"),
        ({"visible": (B, O, S + 1)}, "visible must be"),
        ({"filled": (P + 1,)}, "prompt_tokens must be"),
        ({"q": (B + 1, O, N, H)}, "rows B=7 are not a multiple of prompts P=2"),
        ({"q": (B, O, 3, H)}, "query heads N=3 are not a multiple of key-value heads K=2"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v, k_prompt, v_prompt = (x.shape for x in draw(0))
    shapes = {"q": q, "k": k, "v": v, "visible": (B, O, S), "k_prompt": k_prompt, "v_prompt": v_prompt, "filled": (P,)}
    arrays = [np.zeros(shape, np.float32) for shape in (shapes | change).values()]
    with pytest.raises(ValueError, match=message):
        cascade_attention(*arrays, scale=SCALE)

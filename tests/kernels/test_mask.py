"""The mask's builders, its checks and its tiles, against the definition written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import mask
from kernels.attention.reference import depths, visible
from kernels.attention.tiles import active_tiles, tile
from tests.kernels.oracle import forests, sees

T = 12
seeded = settings(derandomize=True, deadline=None, max_examples=100)
jit_tile = jax.jit(tile, static_argnames=("block_q", "block_k"))


@partial(jax.jit, static_argnums=(1, 2, 3))
def active(end_BS, window, block_q, block_k):
    return active_tiles(end_BS, depths(end_BS), window, block_q, block_k)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=T))
@seeded
def test_segments_see_their_own_past(ids):
    end = mask.segment_ends(np.array(ids))
    for q in range(len(ids)):
        for k in range(len(ids)):
            same = k <= q and ids[k] != 0 and len(set(ids[k : q + 1])) == 1
            assert (k <= q < end[k]) == same


def test_segments_of_many_rows_at_once():
    rows = np.array([[4, 4, 7, 7, 7, 0], [0, 0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(mask.segment_ends(rows), [[2, 2, 5, 5, 5, 0], [0, 0, 3, 6, 6, 6]])


@st.composite
def trees(draw):
    """(lengths, parents) of a depth-first forest; empty segments too."""
    lengths, parents, path = [], [], []
    for segment in range(draw(st.integers(0, 6))):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        lengths.append(draw(st.integers(0, 3)))
        path.append(segment)
    return lengths, parents


@given(trees())
@seeded
def test_trees_see_their_ancestors(tree):
    lengths, parents = tree
    end = mask.tree_ends(lengths, parents)
    segment_of = np.repeat(np.arange(len(lengths)), lengths)
    assert len(end) == sum(lengths)
    for q, segment in enumerate(segment_of):
        ancestors = []
        while segment >= 0:
            ancestors.append(segment)
            segment = parents[segment]
        for k in range(len(end)):
            assert (k <= q < end[k]) == (k <= q and segment_of[k] in ancestors)
    mask.check_ends(end[None])


def test_a_tree_out_of_order_is_refused():
    with pytest.raises(ValueError, match="segment 3 continues segment 1, which had ended before it"):
        mask.tree_ends([1, 1, 1, 1], [-1, 0, 0, 1])
    with pytest.raises(ValueError, match="got 2 lengths and 1 parents"):
        mask.tree_ends([1, 1], [-1])


@given(st.lists(st.integers(0, 6), min_size=5, max_size=5))
@seeded
def test_the_check_accepts_exactly_the_laminar_ranges(end):
    ranges = [(k, e) for k, e in enumerate(end) if e]
    fits = all(k < e <= 5 for k, e in ranges)
    fits &= all(e2 <= e1 for k1, e1 in ranges for k2, e2 in ranges if k1 < k2 < e1)
    fits &= not any(k1 < k < e1 for k1, e1 in ranges for k, e in enumerate(end) if e == 0)
    if fits:
        mask.check_ends(np.array([end]))
    else:
        with pytest.raises(ValueError, match=r"end\[0, \d\]=\d is no tree"):
            mask.check_ends(np.array([end]))


def test_the_check_names_the_place():
    with pytest.raises(ValueError, match=r"end\[1, 1\]=3 is no tree: .* a range that ends at 2; allowed: 2 to 2"):
        mask.check_ends(np.array([[3, 3, 3], [2, 3, 3]]))


any_mask = st.lists(st.integers(-1, T + 1), min_size=T, max_size=T)


@given(any_mask)
@seeded
def test_pairs_and_depths_are_counted_under_any_mask(end):
    seen = sees(end)
    assert mask.num_visible_pairs(np.array([end, end])) == 2 * seen.sum()
    np.testing.assert_array_equal(depths(jnp.array([end]))[0] + 1, seen.sum(1))


@given(forests(T), st.sampled_from([None, 1, 2, 5]))
@seeded
def test_a_window_holds_the_last_tokens_of_a_path(forest, window):
    end, _ = forest
    np.testing.assert_array_equal(visible(jnp.asarray(end)[None], window)[0], sees(end, window))


@given(any_mask, st.sampled_from([(4, 4), (2, 4), (6, 3)]))
@seeded
def test_active_tiles_hold_a_visible_pair(end, blocks):
    """Exactly those, without a window: a tile is active iff some pair of its causal part is visible."""
    block_q, block_k = blocks
    end_BS = jnp.array([end])
    got = np.asarray(active(end_BS, None, block_q, block_k)[0])
    seen = sees(end).reshape(T // block_q, block_q, T // block_k, block_k)
    assert not (seen.any((1, 3)) & ~got).any(), "a visible pair would be skipped"
    tiles = jit_tile(end_BS, block_q=block_q, block_k=block_k)
    np.testing.assert_array_equal(tiles.full_BIJ[0], seen.all((1, 3)))
    for lists, counts, rows in (
        (tiles.k_tiles_BIJ[0], tiles.num_k_BI[0], got),
        (tiles.q_tiles_BJI[0], tiles.num_q_BJ[0], got.T),
    ):
        for indices, count, row in zip(lists, counts, rows, strict=True):
            assert np.asarray(indices)[:count].tolist() == np.flatnonzero(row).tolist()


@given(forests(T), st.sampled_from([None, 2, 5]))
@seeded
def test_no_visible_pair_of_a_forest_is_skipped(forest, window):
    end, _ = forest
    end_BS = jnp.asarray(end)[None]
    seen = sees(end, window).reshape(4, 3, 4, 3)
    tiles = tile(end_BS, window=window, block_q=3, block_k=3)
    assert not (seen.any((1, 3)) & ~np.asarray(active(end_BS, window, 3, 3)[0])).any()
    assert not (np.asarray(tiles.full_BIJ[0]) & ~seen.all((1, 3))).any(), "an invisible pair would be taken for visible"


def test_packed_rows_skip_all_that_is_invisible():
    """Segments and a prompt with answers, in whole tiles: active are the tiles with a visible pair and no other."""
    segments = mask.segment_ends(np.repeat([1, 2, 3], 4))
    prompt = mask.tree_ends([4, 4, 4], [-1, 0, 0])
    end_BS = jnp.asarray(np.stack([segments, prompt]))
    whole = np.asarray(active(end_BS, None, 4, 4)).astype(int)
    np.testing.assert_array_equal(whole[0], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(whole[1], [[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    windowed = np.asarray(active(end_BS, 1, 4, 4)).astype(int)
    np.testing.assert_array_equal(windowed[1], np.eye(3, dtype=int))


def test_blocks_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="block_q=4 and block_k=6: one must be a multiple of the other"):
        tile(jnp.zeros((1, 12), jnp.int32), block_q=4, block_k=6)

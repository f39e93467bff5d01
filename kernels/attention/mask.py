"""The mask of every attention path: `end[k]`, one int32 a key. Query q sees key k iff k <= q < end[k].

A row is laid out depth-first: a segment comes before the segments that continue it. `end` is then the end of a token's
subtree, which covers causal rows, packed segments, a prompt shared by several rollouts and deeper trees; 0 is padding,
seen by none. Builders and checks run on the host; NumPy only, so that data pipelines can use them without jax.
"""

from collections.abc import Sequence

import numpy as np


def segment_ends(segment_ids: np.ndarray) -> np.ndarray:
    """`end` of rows of packed segments that do not see each other.

    Args:
        segment_ids: ints [..., T]; a run of equal ids is one segment, 0 is padding.

    Returns:
        i32[..., T]. Example: [4 4 7 7 7 0] gives [2 2 5 5 5 0].
    """
    T = segment_ids.shape[-1]
    last = np.ones(segment_ids.shape, bool)
    last[..., :-1] = segment_ids[..., 1:] != segment_ids[..., :-1]
    stop = np.where(last, np.arange(1, T + 1), T)
    end = np.minimum.accumulate(stop[..., ::-1], axis=-1)[..., ::-1]
    return np.where(segment_ids == 0, 0, end).astype(np.int32)


def tree_ends(lengths: Sequence[int], parents: Sequence[int]) -> np.ndarray:
    """`end` of a forest of segments, laid out in the order given, which must be depth-first.

    Args:
        lengths: tokens of each segment.
        parents: index of the segment that each one continues; -1 starts a new tree.

    Returns:
        i32[sum(lengths)]. Example, a prompt of 2 with answers of 2 and 1: lengths [2 2 1], parents [-1 0 0] give
        [5 5 4 4 5].

    Raises:
        ValueError: an order that is not depth-first.
    """
    if len(lengths) != len(parents):
        raise ValueError(f"got {len(lengths)} lengths and {len(parents)} parents; every segment needs one of each")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    stops = starts[1:].copy()
    path: list[int] = []
    for segment, parent in enumerate(parents):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(
                f"segment {segment} continues segment {parent}, which had ended before it: list each segment's "
                "whole subtree before its next sibling (depth-first)"
            )
        path.append(segment)
        stops[path] = starts[segment + 1]
    return np.repeat(stops, lengths)


def check_ends(end_BT: np.ndarray) -> None:
    """Check that `end` is a layout of trees: ranges [k, end[k]) nest or are disjoint, padding lies in none.

    The attention paths serve any `end`; this finds mistakes in one that was meant as trees. Host code, O(tokens).

    Raises:
        ValueError: naming the first row and key that does not fit.
    """
    T = end_BT.shape[-1]
    for b, end_T in enumerate(end_BT.tolist()):
        around: list[int] = []  # ends of the ranges that hold the key, the innermost last
        for k, end in enumerate(end_T):
            while around and around[-1] <= k:
                around.pop()
            limit = around[-1] if around else T
            if end == 0 and not around:
                continue
            if not k < end <= limit:
                inside = f"it lies in a range that ends at {limit}" if around else f"the row has T={T} positions"
                raise ValueError(f"end[{b}, {k}]={end} is no tree: {inside}; allowed: {k + 1} to {limit}")
            around.append(end)


def num_visible_pairs(end_BT: np.ndarray) -> int:
    """How many (query, key) pairs the mask lets through: what attention's useful FLOPs are counted from."""
    seen = np.minimum(end_BT, end_BT.shape[-1]) - np.arange(end_BT.shape[-1])
    return int(np.maximum(seen, 0).sum(dtype=np.int64))

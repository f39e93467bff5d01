"""Attention in float64 NumPy that knows only who may see whom, and hypothesis' forests of segments."""

import numpy as np
from hypothesis import strategies as st


def sees(end_T, window=None):
    """bool[T, T] by the definition: query q sees key k iff k <= q < end[k]; of those, the last `window`."""
    T = len(end_T)
    seen = np.array([[k <= q < end_T[k] for k in range(T)] for q in range(T)]).reshape(T, T)
    for row in seen if window is not None else ():
        row[np.flatnonzero(row)[:-window]] = False
    return seen


def attend(q, k, v, masks, scale, w=None, u=None, softcap=None):
    """A loop over rows and heads.

    Args:
        masks: bool[B, T, T], who sees whom.
        w, u: weights of the outputs and the log-sum-exps in a scalar loss (lse of rows that see nothing left out).

    Returns:
        outputs, log-sum-exps, and the gradients of the loss by q, k and v.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    w = np.zeros_like(q) if w is None else np.asarray(w, np.float64)
    u = np.zeros(q.shape[:3]) if u is None else np.asarray(u, np.float64)
    G = q.shape[2] // k.shape[2]
    o, lse, dq, dk, dv = np.zeros_like(q), np.zeros(q.shape[:3]), *(np.zeros_like(x) for x in (q, k, v))
    for b, mask in enumerate(masks):
        for n in range(q.shape[2]):
            q_TH, k_SH, v_SH = q[b, :, n], k[b, :, n // G], v[b, :, n // G]
            s = scale * q_TH @ k_SH.T
            slope = np.ones_like(s)
            if softcap is not None:
                slope = 1 - np.tanh(s / softcap) ** 2
                s = softcap * np.tanh(s / softcap)
            e = np.where(mask, np.exp(s), 0.0)
            total = e.sum(-1)
            p = e / np.where(total == 0, 1, total)[:, None]
            o[b, :, n] = p @ v_SH
            with np.errstate(divide="ignore"):
                lse[b, :, n] = np.log(total)
            dp = w[b, :, n] @ v_SH.T
            ds = slope * scale * p * (dp - (p * dp).sum(-1, keepdims=True) + u[b, :, n, None])
            dq[b, :, n] = ds @ k_SH
            dk[b, :, n // G] += ds.T @ q_TH
            dv[b, :, n // G] += p.T @ w[b, :, n]
    return o, lse, (dq, dk, dv)


def at_hand(x, place, block):
    """[B, I * block, ...]: the tiles of [B, T, ...] that lie at `place`, one after another."""
    tiles = x.reshape(len(x), -1, block, *x.shape[2:])
    return tiles[np.arange(len(x))[:, None], place].reshape(len(x), -1, *x.shape[2:])


@st.composite
def forests(draw, T):
    """(end i32[T], path of every position or None): trees of segments in preorder, then padding.

    A path is the positions that a token may see: its segment so far and all segments above it.
    """
    end, paths = np.zeros(T, np.int32), [None] * T
    num_tokens = draw(st.integers(0, T))
    open_segments: list[list[int]] = []
    position = 0
    while position < num_tokens:
        depth = draw(st.integers(0, len(open_segments)))
        open_segments = open_segments[:depth]
        length = draw(st.integers(1, num_tokens - position))
        segment = list(range(position, position + length))
        above = [t for other in open_segments for t in other]
        for i, t in enumerate(segment):
            paths[t] = above + segment[: i + 1]
        open_segments.append(segment)
        position += length
        for t in (t for other in open_segments for t in other):
            end[t] = position
    return end, paths

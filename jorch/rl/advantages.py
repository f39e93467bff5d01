"""Rewards of one group -> advantages. Pure numpy; sits between `rl/rewards.py` and `rl/samples.py`."""

from typing import Literal

import numpy as np

STD_EPSILON = 1e-6


def advantages(rewards: np.ndarray, kind: Literal["grpo", "dr_grpo", "rloo"], max_abs: float = np.inf) -> np.ndarray:
    """Group-relative advantages f32[g] of the rewards f32[g], clipped to +-max_abs.

    grpo: (R - mean) / (population std + 1e-6) (arXiv 2402.03300; the clip is ToolOrchestra's);
    dr_grpo: R - mean (arXiv 2503.20783); rloo: R - mean of the others (arXiv 2402.14740).
    Equal rewards, a single one among them, give exactly 0.
    """
    # Sums of few float32 values are exact in float64, so equal rewards have exactly their value as mean.
    exact = np.asarray(rewards, np.float32).astype(np.float64)
    assert exact.ndim == 1, f"rewards of shape {exact.shape}, expected [g]"
    centred = exact - exact.mean()
    if kind == "grpo":
        centred /= exact.std() + STD_EPSILON
    elif kind == "rloo":
        centred *= exact.size / max(exact.size - 1, 1)  # R - mean of the others = (R - mean) g/(g - 1)
    else:
        assert kind == "dr_grpo", kind
    return np.clip(centred, -max_abs, max_abs).astype(np.float32)


def keeps_group(rewards: np.ndarray, min_std: float) -> bool:
    """Whether the population std of the rewards f32[g] is above `min_std`; other groups teach nothing."""
    return bool(np.asarray(rewards, np.float32).astype(np.float64).std() > min_std)

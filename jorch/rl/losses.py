"""The policy-gradient loss of one micro-batch, from token logprobs: the last stop before the gradient.

Every choice is a value of AlgorithmConfig. All sums divide by counts of the global batch, so that losses and
metrics of micro-batches simply add up, whatever the packing. A sample with `num_copies` = k counts k times.
A *sequence* is a Sample: the tokens of one segment.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jorch.rl import log_ratios
from jorch.sections import AlgorithmConfig
from jorch.types import PackedBatch

# Probability ratios are e**20 at most: beyond that float32 overflows and 0 * inf in the backward pass is NaN.
MAX_LOG_RATIO_NATS = 20.0


def policy_loss(
    logprobs_BT: jax.Array,
    entropy_BT: jax.Array | None,
    batch: PackedBatch,
    loss_tokens: jax.Array,
    num_sequences: jax.Array,
    *,
    config: AlgorithmConfig,
    on_policy: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss f32[], metrics of f32[]), this micro-batch's addends to the global batch's loss and means.

    One metric, `log_ratios.COUNTS`, is a vector.

    logprobs_BT: f32 nats of each token under the trained policy; entropy_BT: f32 nats of the distribution
    that it was drawn from, needed where its coefficient is not 0; batch: fields [B, T]; loss_tokens,
    num_sequences: f32[], of the global batch, copies counted. Where loss_weights is 0 every input is ignored,
    NaN included.

    loss = sum over tokens of share * (-weight * min(ratio A, clip(ratio) A) + kl_coefficient * KL -
    entropy_coefficient * entropy). `on_policy`: this is the only update on its rollouts, so the old policy is
    the present one (ratio 1, gradient A * d logprob); else it is that of batch.old_logprobs. `weight` is the
    truncated importance weight min(old / sampler, cap) of each token, a constant in the gradient, which makes
    up for a sampler whose numerics or weights differ.
    """
    trained_BT = batch.loss_weights > 0

    def masked(x_BT: jax.Array) -> jax.Array:
        return jnp.where(trained_BT, x_BT, 0.0)

    def mean(x_BT: jax.Array) -> jax.Array:
        return jnp.sum(batch.loss_weights * x_BT) / jnp.maximum(loss_tokens, 1.0)

    logprobs_BT, sampler_BT = masked(logprobs_BT), masked(batch.sampler_logprobs)
    old_BT = jax.lax.stop_gradient(logprobs_BT) if on_policy else masked(batch.old_logprobs)
    shares_BT = _shares(batch, loss_tokens, num_sequences, config.aggregation)
    log_ratio_BT = logprobs_BT - old_BT
    if config.ratio == "sequence":
        log_ratio_BT = _sequence_mean(log_ratio_BT, batch)
    ratio_BT = _bounded_exp(log_ratio_BT)
    gain_BT, limits = _clipped_gain(ratio_BT, masked(batch.advantages), config)
    metrics = {log_ratios.COUNTS: log_ratios.count(old_BT - sampler_BT, batch.loss_weights)}
    metrics |= {"policy/ratio": mean(ratio_BT)} | {name: mean(hit_BT) for name, hit_BT in limits.items()}
    metrics["policy/sampler_gap_nats"] = mean(jnp.abs(logprobs_BT - sampler_BT))
    if config.importance_cap is not None:
        importance_BT = _bounded_exp(old_BT - sampler_BT)
        gain_BT *= jnp.minimum(importance_BT, config.importance_cap)
        metrics["policy/truncated_fraction"] = mean(importance_BT > config.importance_cap)
    loss = -jnp.sum(shares_BT * gain_BT)
    metrics["policy/loss"] = loss
    if config.kl_coefficient:
        kl_BT = _kl(logprobs_BT, masked(batch.ref_logprobs), config.kl_estimator)
        loss += config.kl_coefficient * jnp.sum(shares_BT * kl_BT)
        metrics["policy/kl_nats"] = mean(kl_BT)
    if config.entropy_coefficient:
        assert entropy_BT is not None, "entropy_coefficient is set, but no entropy was computed"
        entropy_BT = masked(entropy_BT)
        loss -= config.entropy_coefficient * jnp.sum(shares_BT * entropy_BT)
        metrics["policy/entropy_nats"] = mean(entropy_BT)
    return loss, metrics


def _bounded_exp(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(x, -MAX_LOG_RATIO_NATS, MAX_LOG_RATIO_NATS))


def _shares(batch: PackedBatch, loss_tokens: jax.Array, num_sequences: jax.Array, aggregation: str) -> jax.Array:
    """Weight f32[B, T] of each token in the loss.

    sequence_sum is Dr.GRPO's aggregation (arXiv 2503.20783) without its constant: theirs divides by the
    longest allowed completion as well, here that is a factor of the learning rate.
    """
    if aggregation == "token_mean":
        return batch.loss_weights / jnp.maximum(loss_tokens, 1.0)
    shares_BT = batch.loss_weights / jnp.maximum(num_sequences, 1.0)
    if aggregation == "sequence_mean":
        shares_BT /= _sequence_lengths(batch)
    return shares_BT


def _clipped_gain(
    ratio_BT: jax.Array, advantages_BT: jax.Array, config: AlgorithmConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's surrogate (arXiv 1707.06347, eq. 7) and where each limit cuts the gradient off, by metric name.

    asymmetric: DAPO's clip-higher (arXiv 2503.14476); dual: also at least dual_clip * A where A < 0
    (arXiv 1912.09729).
    """
    low = 1 - config.clip_low
    high = 1 + (config.clip_low if config.clip == "symmetric" else config.clip_high)
    gain_BT = jnp.minimum(ratio_BT * advantages_BT, jnp.clip(ratio_BT, low, high) * advantages_BT)
    limits = {
        "policy/clip_low_fraction": (ratio_BT < low) & (advantages_BT < 0),
        "policy/clip_high_fraction": (ratio_BT > high) & (advantages_BT > 0),
    }
    if config.clip == "dual":
        bound_BT = jnp.where(advantages_BT < 0, config.dual_clip * advantages_BT, -jnp.inf)
        limits["policy/clip_dual_fraction"] = gain_BT < bound_BT
        gain_BT = jnp.maximum(gain_BT, bound_BT)
    return gain_BT, limits


def _kl(logprobs_BT: jax.Array, ref_BT: jax.Array, estimator: Literal["k1", "k2", "k3"]) -> jax.Array:
    """Estimates f32[B, T] of each token's KL(policy || reference), nats (Schulman's k1, k2, k3).

    As losses they differ: the mean gradient of k1 is 0, of k2 that of KL(policy || reference), of k3 that of
    KL(reference || policy).
    """
    log_ratio_BT = ref_BT - logprobs_BT
    if estimator == "k1":
        return -log_ratio_BT
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio_BT)
    return _bounded_exp(log_ratio_BT) - log_ratio_BT - 1


def _sequence_lengths(batch: PackedBatch) -> jax.Array:
    """Trained tokens of the sequence that each token belongs to, f32[B, T]; at least 1."""
    return jnp.maximum(_sequence_sum(batch.loss_weights > 0, batch.segment_ids), 1.0)


def _sequence_mean(x_BT: jax.Array, batch: PackedBatch) -> jax.Array:
    """Mean of `x_BT` (0 where not trained) over the trained tokens of each token's sequence, f32[B, T]: of
    log ratios, GSPO's length-normalised one (arXiv 2507.18071, eq. 7)."""
    return _sequence_sum(x_BT, batch.segment_ids) / _sequence_lengths(batch)


def _sequence_sum(x_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Sum of `x_BT` over each token's own segment, f32[B, T]."""

    def of_row(x_T: jax.Array, ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_T, ids_T, num_segments=x_T.shape[0] + 1)[ids_T]

    return jax.vmap(of_row)(x_BT.astype(jnp.float32), segment_ids_BT)

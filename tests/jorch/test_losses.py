"""policy_loss against a float64 reading of its definition: loops over unpacked sequences, finite differences.

Every token of every sample has an id of its own, so `table[token_ids]` gives a packed batch's logprobs, and
the gradient of `table` does not know how samples were packed.
"""

import itertools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jorch.data.packing import pack
from jorch.rl import log_ratios
from jorch.rl.losses import policy_loss
from jorch.rl.samples import merge_copies
from jorch.sections import AlgorithmConfig
from jorch.types import PackedBatch, Sample

NUM_IDS, ROW_TOKENS, NUM_MICRO = (
    192,
    32,
    8,
)  # the same for most tests: jax runs them op by op, each compiled once


@dataclass
class Problem:
    """Samples and, by token id, the quantities that a trainer would compute: f64[number of ids]."""

    samples: list[Sample]
    logprobs: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    entropy: np.ndarray


def make_problem(seed: int = 0, num_prompts: int = 4, siblings: int = 3, spread_nats: float = 0.4) -> Problem:
    """Ratios, weights and KL terms on both sides of every clip; two-part tails with a masked middle."""
    rng = np.random.default_rng(seed)
    ids = itertools.count()
    samples = []
    for _ in range(num_prompts):
        prompt = [next(ids) for _ in range(rng.integers(1, 5))]
        for _ in range(siblings):
            mask = [True] * rng.integers(1, 4) + [False] * rng.integers(0, 3) + [True] * rng.integers(1, 4)
            tokens = np.array(prompt + [next(ids) for _ in mask], np.int32)
            mask = np.array([False] * len(prompt) + mask)
            logprobs = np.where(mask, rng.uniform(-3, -0.1, len(mask)), 0).astype(np.float32)
            samples.append(Sample(tokens, mask, logprobs, float(rng.normal()), int(rng.integers(1, 4))))
    assert next(ids) <= NUM_IDS
    sampler = np.zeros(NUM_IDS)
    for sample in samples:
        sampler[sample.token_ids] = sample.logprobs
    old, logprobs = (sampler + rng.normal(0, spread_nats, NUM_IDS) for _ in range(2))
    return Problem(samples, logprobs, old, rng.uniform(-3, -0.1, NUM_IDS), rng.uniform(0, 2, NUM_IDS))


def oracle_loss(problem: Problem, config: AlgorithmConfig, on_policy: bool, logprobs: np.ndarray) -> float:
    """The loss at `logprobs` where everything behind a stop_gradient stays at problem.logprobs."""
    old = problem.logprobs if on_policy else problem.old
    num_sequences = sum(s.num_copies for s in problem.samples)
    num_tokens = sum(s.num_copies * int(s.loss_mask.sum()) for s in problem.samples)
    total = 0.0
    for sample in problem.samples:
        trained = [int(t) for t, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m]
        sampler = [float(lp) for lp, m in zip(sample.logprobs, sample.loss_mask, strict=True) if m]
        log_ratios = [logprobs[t] - old[t] for t in trained]
        if config.ratio == "sequence":
            log_ratios = [sum(log_ratios) / len(trained)] * len(trained)
        losses = []
        for t, log_ratio, sampler_logprob in zip(trained, log_ratios, sampler, strict=True):
            gain = oracle_gain(math.exp(log_ratio), sample.advantage, config)
            if config.importance_cap is not None:
                gain *= min(math.exp(old[t] - sampler_logprob), config.importance_cap)
            distance = problem.ref[t] - logprobs[t]
            kl = {"k1": -distance, "k2": distance**2 / 2, "k3": math.exp(distance) - 1 - distance}
            losses.append(
                -gain
                + config.kl_coefficient * kl[config.kl_estimator]
                - config.entropy_coefficient * problem.entropy[t]
            )
        if config.aggregation == "token_mean":
            total += sample.num_copies * sum(losses) / num_tokens
        elif config.aggregation == "sequence_mean":
            total += sample.num_copies * sum(losses) / len(losses) / num_sequences
        else:
            total += sample.num_copies * sum(losses) / num_sequences
    return total


def oracle_gain(ratio: float, advantage: float, config: AlgorithmConfig) -> float:
    high = config.clip_low if config.clip == "symmetric" else config.clip_high
    clipped = min(max(ratio, 1 - config.clip_low), 1 + high)
    gain = min(ratio * advantage, clipped * advantage)
    if config.clip == "dual" and advantage < 0:
        gain = max(gain, config.dual_clip * advantage)
    return gain


def oracle_gradient(problem: Problem, config: AlgorithmConfig, on_policy: bool, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros(NUM_IDS)
    for i in np.concatenate([sample.token_ids for sample in problem.samples]):
        shift = np.zeros(NUM_IDS)
        shift[i] = step
        up = oracle_loss(problem, config, on_policy, problem.logprobs + shift)
        down = oracle_loss(problem, config, on_policy, problem.logprobs - shift)
        gradient[i] = (up - down) / (2 * step)
    return gradient


def pack_problem(problem: Problem, row_tokens=ROW_TOKENS, micro_rows=2) -> PackedBatch:
    batch = pack(problem.samples, row_tokens=row_tokens, micro_rows=micro_rows, num_micro=NUM_MICRO)
    old, ref = (np.where(batch.segment_ids, x[batch.token_ids], 0) for x in (problem.old, problem.ref))
    return batch._replace(old_logprobs=old.astype(np.float32), ref_logprobs=ref.astype(np.float32))


def run(problem: Problem, config: AlgorithmConfig, on_policy: bool, batch: PackedBatch | None = None):
    """(loss, metrics summed over micro-batches, gradient with respect to the table of logprobs)."""
    batch = pack_problem(problem) if batch is None else batch
    entropy = jnp.asarray(problem.entropy, jnp.float32) if config.entropy_coefficient else None
    loss_tokens = jnp.float32(sum(s.num_copies * s.loss_mask.sum() for s in problem.samples))
    num_sequences = jnp.float32(sum(s.num_copies for s in problem.samples))

    def micro_loss(table, micro: PackedBatch):
        return policy_loss(
            table[micro.token_ids],
            None if entropy is None else entropy[micro.token_ids],
            micro,
            loss_tokens,
            num_sequences,
            config=config,
            on_policy=on_policy,
        )

    def loss_of(table):
        losses, metrics = jax.vmap(micro_loss, in_axes=(None, 0))(table, batch)
        return losses.sum(), {name: x.sum() for name, x in metrics.items()}

    table = jnp.asarray(problem.logprobs, jnp.float32)
    (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(table)
    return float(loss), {name: float(x) for name, x in metrics.items()}, np.asarray(gradient, np.float64)


def assert_close(got, want):
    """float32 sums of about 100 terms of order 1; finite differences are good to 1e-9 here."""
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=3e-6)


EXTRAS = [  # taken in turn, so that each occurs with most choices of the others
    {},
    {"kl_coefficient": 0.3, "kl_estimator": "k1"},
    {"kl_coefficient": 0.3, "kl_estimator": "k2", "importance_cap": None},
    {"kl_coefficient": 0.3, "kl_estimator": "k3", "entropy_coefficient": 0.2},
    {"entropy_coefficient": 0.2, "importance_cap": 1.1},
]
CHOICES = list(
    itertools.product(
        ("token", "sequence"),
        ("symmetric", "asymmetric", "dual"),
        ("token_mean", "sequence_mean", "sequence_sum"),
        (False, True),
    )
)


@pytest.mark.parametrize(("index", "choice"), list(enumerate(CHOICES)), ids=["-".join(map(str, c)) for c in CHOICES])
def test_loss_and_gradient_match_the_definition(index, choice):
    ratio, clip, aggregation, on_policy = choice
    config = AlgorithmConfig(
        ratio=ratio, clip=clip, aggregation=aggregation, dual_clip=1.4, **EXTRAS[index % len(EXTRAS)]
    )
    problem = make_problem(seed=index)
    loss, metrics, gradient = run(problem, config, on_policy)
    assert_close(loss, oracle_loss(problem, config, on_policy, problem.logprobs))
    assert_close(gradient, oracle_gradient(problem, config, on_policy))
    if aggregation == "token_mean":  # elsewhere the reported means of the terms weigh tokens differently
        total = metrics["policy/loss"] + config.kl_coefficient * metrics.get("policy/kl_nats", 0)
        assert_close(total - config.entropy_coefficient * metrics.get("policy/entropy_nats", 0), loss)


def test_metrics_are_global_token_means():
    problem = make_problem(seed=1, num_prompts=8)
    config = AlgorithmConfig(clip="dual", dual_clip=1.4, importance_cap=1.2, kl_coefficient=1, entropy_coefficient=1)
    _, metrics, _ = run(problem, config, on_policy=False)
    names = ("ratio", "clip_low_fraction", "clip_high_fraction", "clip_dual_fraction", "truncated_fraction")
    names += ("sampler_gap_nats", "kl_nats", "entropy_nats")
    sums, tokens = dict.fromkeys(names, 0.0), 0
    for s in problem.samples:
        for t, sampler in zip(s.token_ids[s.loss_mask], s.logprobs[s.loss_mask], strict=True):
            ratio = math.exp(problem.logprobs[t] - problem.old[t])
            distance = problem.ref[t] - problem.logprobs[t]
            values = (
                ratio,
                s.advantage < 0 and ratio < 0.8,
                s.advantage > 0 and ratio > 1.28,
                s.advantage < 0 and ratio > 1.4,
                math.exp(problem.old[t] - sampler) > 1.2,
                abs(problem.logprobs[t] - sampler),
                math.exp(distance) - 1 - distance,
                problem.entropy[t],
            )
            tokens += s.num_copies
            for name, value in zip(names, values, strict=True):
                sums[name] += s.num_copies * value
    assert set(metrics) == {f"policy/{name}" for name in names} | {"policy/loss", log_ratios.COUNTS}
    for name in names:
        assert sums[name] > 0
        assert_close(metrics[f"policy/{name}"], sums[name] / tokens)


def test_on_policy_is_the_plain_policy_gradient():
    """Where sampler and trainer agree: d loss / d logprob = -copies * A / global tokens, for every clip."""
    problem = make_problem(seed=2, spread_nats=0.0)
    tokens = sum(s.num_copies * s.loss_mask.sum() for s in problem.samples)
    expected = np.zeros(NUM_IDS)
    for s in problem.samples:
        expected[s.token_ids[s.loss_mask]] = -s.num_copies * s.advantage / tokens
    for clip, on_policy in itertools.product(("symmetric", "asymmetric", "dual"), (True, False)):
        _, metrics, gradient = run(problem, AlgorithmConfig(clip=clip), on_policy)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
        assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert metrics["policy/sampler_gap_nats"] < 1e-6


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_packing_changes_nothing(ratio, aggregation):
    problem = make_problem(seed=3)
    config = AlgorithmConfig(ratio=ratio, aggregation=aggregation, kl_coefficient=0.1)
    loss, metrics, gradient = run(problem, config, on_policy=False)
    order = np.random.default_rng(0).permutation(len(problem.samples))
    shuffled = replace(problem, samples=[problem.samples[i] for i in order])
    batch = pack_problem(problem)
    reversed_rows = (field.reshape(-1, ROW_TOKENS)[::-1].reshape(field.shape) for field in batch)
    short = pack_problem(problem, row_tokens=20)  # other neighbours, more copies of prompts
    padded = (np.pad(field, [(0, 0), (0, 0), (0, ROW_TOKENS - 20)]) for field in short)
    for batch in (
        pack_problem(shuffled),
        PackedBatch(*reversed_rows),
        PackedBatch(*padded),
        pack_problem(problem, row_tokens=128, micro_rows=1),  # all micro-batches but one or two stay empty
    ):
        other_loss, other_metrics, other_gradient = run(problem, config, on_policy=False, batch=batch)
        assert_close(other_loss, loss)
        assert_close(other_gradient, gradient)
        assert other_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            assert_close(other_metrics[name], value)


@given(seed=st.integers(0, 1000), copies=st.lists(st.integers(1, 4), min_size=4, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=6)
def test_merged_copies_equal_the_copies(seed, copies):
    single = make_problem(seed, num_prompts=2, siblings=2)
    apart = replace(
        single,
        samples=[replace(s, num_copies=1) for s, k in zip(single.samples, copies, strict=True) for _ in range(k)],
    )
    merged = replace(single, samples=merge_copies(apart.samples))
    assert [s.num_copies for s in merged.samples] == copies
    for aggregation in ("token_mean", "sequence_mean"):
        config = AlgorithmConfig(aggregation=aggregation, ratio="sequence")
        one, two = run(apart, config, on_policy=False), run(merged, config, on_policy=False)
        assert_close(one[0], two[0])
        assert_close(one[2], two[2])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_policy", [False, True])
def test_untrained_positions_are_ignored_whatever_they_hold(poison, on_policy):
    problem = make_problem(seed=4)
    config = AlgorithmConfig(ratio="sequence", aggregation="sequence_mean", kl_coefficient=0.1, entropy_coefficient=0.1)
    loss, metrics, gradient = run(problem, config, on_policy)
    batch = pack_problem(problem)
    untrained = batch.loss_weights == 0
    floats = ("advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs")
    poisoned = batch._replace(**{n: np.where(untrained, np.float32(poison), getattr(batch, n)) for n in floats})
    trained_ids = np.unique(batch.token_ids[~untrained])
    spoilt = replace(problem, logprobs=np.full_like(problem.logprobs, poison), entropy=problem.entropy + poison)
    spoilt.logprobs[trained_ids] = problem.logprobs[trained_ids]
    spoilt.entropy[trained_ids] = problem.entropy[trained_ids]
    assert np.isinf(spoilt.logprobs).any() or np.isnan(spoilt.logprobs).any()
    other_loss, other_metrics, other_gradient = run(spoilt, config, on_policy, batch=poisoned)
    assert (other_loss, other_metrics) == (loss, metrics)
    np.testing.assert_array_equal(other_gradient, gradient)


@pytest.mark.parametrize("gap_nats", [-500.0, 500.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_extreme_ratios_stay_finite(gap_nats, ratio):
    problem = make_problem(seed=5)
    problem.old[:] = problem.logprobs - gap_nats
    problem.ref[:] = problem.logprobs + gap_nats
    config = AlgorithmConfig(ratio=ratio, clip="dual", kl_coefficient=0.1)
    loss, metrics, gradient = run(problem, config, on_policy=False)
    assert np.isfinite([loss, *metrics.values(), *gradient]).all()


def test_entropy_bonus_without_entropy_is_our_own_mistake():
    problem = make_problem()
    micro = PackedBatch(*(field[0] for field in pack_problem(problem)))
    logprobs = jnp.zeros(micro.token_ids.shape)
    config = AlgorithmConfig(entropy_coefficient=0.1)
    with pytest.raises(AssertionError, match="entropy"):
        policy_loss(logprobs, None, micro, jnp.float32(1), jnp.float32(1), config=config, on_policy=True)


def test_gspo_is_the_paper_s_objective():
    """sequence ratio + sequence_mean: mean over i of min(s_i A_i, clip(s_i) A_i), arXiv 2507.18071 eq. 5."""
    problem = make_problem(seed=6)
    config = AlgorithmConfig(
        ratio="sequence", aggregation="sequence_mean", clip="symmetric", clip_low=0.1, importance_cap=None
    )
    loss, _, _ = run(problem, config, on_policy=False)
    objective = count = 0.0
    for s in problem.samples:
        ids = s.token_ids[s.loss_mask]
        ratio = math.exp(np.mean(problem.logprobs[ids] - problem.old[ids]))
        objective += s.num_copies * min(ratio * s.advantage, np.clip(ratio, 0.9, 1.1) * s.advantage)
        count += s.num_copies
    assert_close(loss, -objective / count)

"""The optax chain, in float32: clipping, then AdamW, Adafactor, or Muon for matrices and Adam for the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jorch.sections import OptimizerConfig

# Reduction and output axes of the stacked matrices [L, ...]; everything else (norms, embeddings) gets Adam.
_MATRIX_AXES = {
    "q": ((1,), (2, 3)),
    "k": ((1,), (2, 3)),
    "v": ((1,), (2, 3)),
    "o": ((1, 2), (3,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


def make_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, or cosine or linear decay to `final_fraction` of it at `steps`."""
    decay_steps = max(steps - config.warmup_steps, 1)
    end = peak * config.final_fraction
    decay = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        "linear": optax.linear_schedule(peak, end, decay_steps),
    }[config.schedule]
    # From 1 / warm-up, not 0: a first step that changes nothing would waste a batch of rollouts.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for a run of `steps` updates."""
    rate = make_schedule(config, config.learning_rate, steps)
    match config.kind:
        case "adam":
            rule = optax.adamw(
                rate,
                b1=config.beta1,
                b2=config.beta2,
                mu_dtype=config.moment_dtype,
                weight_decay=config.weight_decay,
            )
        case "adafactor":
            rule = _adafactor(rate, config.weight_decay)
        case "muon":
            rule = optax.contrib.muon(
                make_schedule(config, config.muon_learning_rate, steps),
                weight_decay=config.weight_decay,
                mu_dtype=config.moment_dtype,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                adam_learning_rate=rate,
                muon_weight_dimension_numbers=_dimension_numbers,
            )
    return _in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), rule))


def _adafactor(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without momentum; axes below 128 are not factored.

    Unlike `optax.adafactor` the rate is absolute, not relative to a parameter's size, and it scales the weight decay
    too, so that rates and schedules mean what they mean for Adam.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` for parameters of any dtype: in bfloat16, a second moment times 0.999 would stay what it was."""

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return rule.update(to_float32(updates), state, to_float32(params))

    return optax.GradientTransformation(lambda params: rule.init(to_float32(params)), update)


def _dimension_numbers(params: Any) -> Any:
    def of(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        axes = _MATRIX_AXES.get(path[-1].key)
        return optax.contrib.MuonDimensionNumbers(*axes) if axes else None

    return jax.tree_util.tree_map_with_path(of, params)

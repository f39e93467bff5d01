"""The optax chain: clipping, then AdamW, or Muon for matrices and Adam for the rest."""

from typing import Any

import jax
import optax

from jorch.config import OptimizerConfig

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
    if config.kind == "adam":
        rule = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    else:
        rule = optax.contrib.muon(
            make_schedule(config, config.muon_learning_rate, steps),
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=_dimension_numbers,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _dimension_numbers(params: Any) -> Any:
    def of(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        axes = _MATRIX_AXES.get(path[-1].key)
        return optax.contrib.MuonDimensionNumbers(*axes) if axes else None

    return jax.tree_util.tree_map_with_path(of, params)

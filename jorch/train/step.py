"""The one jitted train step, for SFT and RL alike: its loss is an argument."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jorch.model.transformer import Params, Trainable
from jorch.sharding import replicated
from jorch.train.logprobs import token_logprobs
from jorch.train.state import TrainState, state_shardings
from jorch.types import PackedBatch

Metrics = dict[str, jax.Array]


class LossFn(Protocol):
    """Token log-probabilities of one micro-batch to its share of the loss.

    Both the loss and every metric are already divided by the global `loss_tokens` or `num_sequences`, so that
    summing over micro-batches gives the loss of the whole batch, however it was split or packed.
    """

    def __call__(
        self,
        logprobs_BT: jax.Array,
        entropy_BT: jax.Array | None,
        batch: PackedBatch,
        loss_tokens: jax.Array,
        num_sequences: jax.Array,
    ) -> tuple[jax.Array, Metrics]: ...


class TrainStep(Protocol):
    """(state, batch [M, B, T], number of sequences, frozen parameters) -> (state, metrics); the state is donated."""

    def __call__(
        self, state: TrainState, batch: PackedBatch, num_sequences: Any, frozen: Params | None = None, /
    ) -> tuple[TrainState, Metrics]: ...


def make_train_step(
    model: Trainable,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    mesh: Mesh,
    *,
    with_entropy: bool = False,
) -> TrainStep:
    """Compile-once step: gradients summed over the filled micro-batches, then one update.

    A batch whose gradient is not finite changes nothing but the step count; `train/skipped` is then 1.
    """

    def micro_loss(
        params: Params, frozen: Params | None, batch: PackedBatch, loss_tokens: jax.Array, num_sequences: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        module = model.bind(params, frozen)
        hidden_BTD = module.hidden(batch.token_ids, batch.positions, batch.visible_until, mesh)
        logprobs_BT, entropy_BT = token_logprobs(hidden_BTD, module.unembedding_VD, batch, with_entropy=with_entropy)
        return loss_fn(logprobs_BT, entropy_BT, batch, loss_tokens, num_sequences)

    def step(
        state: TrainState, batch: PackedBatch, num_sequences: Any, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        loss_tokens = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        num_sequences = jnp.maximum(num_sequences, 1.0)
        grad_fn = jax.value_and_grad(micro_loss, has_aux=True)

        def of_micro(index: Any) -> tuple[tuple[jax.Array, Metrics], Params]:
            micro = jax.tree.map(lambda x: x[index], batch)
            return grad_fn(state.params, frozen, micro, loss_tokens, num_sequences)

        # Summed in float32 whatever the parameters are in, or the sum would depend on the number of addends.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(of_micro, 0))
        # Packing fills micro-batches from the first on; the empty ones at the end are not visited.
        num_filled = jnp.sum(jnp.any(batch.loss_weights > 0, axis=(1, 2)))
        (loss, metrics), grads = jax.lax.fori_loop(
            0, num_filled, lambda i, total: jax.tree.map(jnp.add, total, of_micro(i)), zeros
        )
        grad_norm = optax.tree_utils.tree_norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state)
        )
        metrics = metrics | {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/skipped": 1.0 - finite.astype(jnp.float32),
            "train/loss_tokens": loss_tokens,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_logprobs_fn(model: Trainable, mesh: Mesh | None = None) -> Callable[..., jax.Array]:
    """Jitted (params, batch, frozen=None) -> log-probabilities f32[M, B, T] of a packed batch."""

    def logprobs(params: Params, batch: PackedBatch, frozen: Params | None = None) -> jax.Array:
        def of_micro(micro: PackedBatch) -> jax.Array:
            module = model.bind(params, frozen)
            hidden_BTD = module.hidden(micro.token_ids, micro.positions, micro.visible_until, mesh)
            return token_logprobs(hidden_BTD, module.unembedding_VD, micro, with_entropy=False)[0]

        return jax.lax.map(of_micro, batch)

    return jax.jit(logprobs)

"""Decoding over a KV cache that is kept across the turns of a trajectory.

The cache is slot-aligned: every append writes one block of columns for all rows, a single `dynamic_update_slice`, and
raggedness lives in `valid` and in the rows' own positions. `compact` moves the valid columns of each row to the front
when the columns run out. Of prompts that several rows share, `share` keeps the first tokens once a prompt, and every
step reads them once for all siblings (`kernels.decode`). Letters: B rows, O appended tokens, S columns, K key-value
heads, H head dim, D model, V vocabulary; P prompts, C tokens of each that are kept once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jorch.model.layers import Block
from jorch.model.transformer import Params, Qwen3, Transformer
from jorch.sections import ModelConfig
from kernels.decode.api import Seats, cascade_attention, decode_attention


class Prefix(NamedTuple):
    """The first C tokens of prompts, every column filled, and the rows that begin with them."""

    k: tuple[jax.Array, ...]  # per layer [P, K, H, C]
    v: tuple[jax.Array, ...]  # per layer [P, K, C, H]
    seats: Seats


class Cache(NamedTuple):
    """Keys and values of all rows (a pytree), and where the next block goes."""

    k: tuple[jax.Array, ...]  # per layer [B, K, H, S]: scores are then sums of whole rows of columns
    v: tuple[jax.Array, ...]  # per layer [B, K, S, H]
    valid: jax.Array  # bool[B, S]
    num_tokens: jax.Array  # i32[B], the next token's position
    slot: jax.Array  # i32[], the next free column
    hidden_BD: jax.Array  # final hidden state of each row's last token
    prefix: Prefix | None = None  # what lies before the rows' own columns

    @property
    def num_shared(self) -> int:
        """Tokens of each row that lie in the prefix."""
        return 0 if self.prefix is None else self.prefix.k[0].shape[-1]


class Sampled(NamedTuple):
    """token_ids i32[B, N], logprobs f32[B, N], num_tokens i32[B]; rows end with the stop token or at N."""

    token_ids: jax.Array
    logprobs: jax.Array
    num_tokens: jax.Array


def empty_cache(config: ModelConfig, num_rows: int, num_columns: int) -> Cache:
    """A cache without tokens."""
    B, K, S, H = num_rows, config.num_key_value_heads, num_columns, config.head_dim
    layers = range(config.num_hidden_layers)
    return Cache(
        k=tuple(jnp.zeros((B, K, H, S), config.compute_dtype) for _ in layers),
        v=tuple(jnp.zeros((B, K, S, H), config.compute_dtype) for _ in layers),
        valid=jnp.zeros((num_rows, num_columns), bool),
        num_tokens=jnp.zeros(num_rows, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
        hidden_BD=jnp.zeros((num_rows, config.hidden_size), config.output_dtype),
    )


def append(
    module: Transformer, blocks: Sequence[Block], cache: Cache, token_ids_BO: jax.Array, ok_BO: jax.Array
) -> Cache:
    """Append right-padded tokens; `ok` is False on padding. The slot moves on by the longest row."""
    positions_BO = cache.num_tokens[:, None] + jnp.cumsum(ok_BO, axis=1, dtype=jnp.int32) - 1
    valid = jax.lax.dynamic_update_slice(cache.valid, ok_BO, (0, cache.slot))
    column = jnp.arange(cache.valid.shape[1])
    last_visible = cache.slot + jnp.arange(token_ids_BO.shape[1])
    visible_BOS = valid[:, None, :] & (column <= last_visible[:, None])
    x_BOD, rope = module.start(token_ids_BO, jnp.maximum(positions_BO, 0))
    scale = module.config.head_dim**-0.5
    keys, values = list(cache.k), list(cache.v)
    for index, block in enumerate(blocks):

        def attend(q_BONH: jax.Array, k_BOKH: jax.Array, v_BOKH: jax.Array, i: int = index) -> jax.Array:
            keys[i] = jax.lax.dynamic_update_slice(keys[i], k_BOKH.transpose(0, 2, 3, 1), (0, 0, 0, cache.slot))
            values[i] = jax.lax.dynamic_update_slice(values[i], v_BOKH.swapaxes(1, 2), (0, 0, cache.slot, 0))
            if cache.prefix is None:
                return decode_attention(q_BONH, keys[i], values[i], visible_BOS, scale=scale)[0]
            prefix, num_shared = cache.prefix, jnp.full(len(cache.prefix.k[i]), cache.num_shared)
            own = (keys[i], values[i], visible_BOS)
            return cascade_attention(q_BONH, *own, prefix.k[i], prefix.v[i], num_shared, prefix.seats, scale=scale)[0]

        x_BOD = block(x_BOD, rope, attend)
    num_new = jnp.sum(ok_BO, axis=1, dtype=jnp.int32)
    last_BD = jnp.take_along_axis(x_BOD, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)[:, 0]
    return Cache(
        k=tuple(keys),
        v=tuple(values),
        valid=valid,
        num_tokens=cache.num_tokens + num_new,
        slot=cache.slot + jnp.max(num_new),
        hidden_BD=jnp.where((num_new > 0)[:, None], module.finish(last_BD), cache.hidden_BD),
        prefix=cache.prefix,
    )


def decode(
    module: Transformer,
    blocks: Sequence[Block],
    cache: Cache,
    limit_B: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array,
    max_tokens: int,
    stop_id: int,
) -> tuple[Cache, Sampled]:
    """Sample tokens for every row until it has drawn `stop_id` or reached its limit.

    Args:
        limit_B: i32[B], at most `max_tokens`; a row with limit 0 takes no part.
        keys_B: one PRNG key per row; a token's noise depends on its row's key and position only, not on the
            batch around it.
        temperature: f32[]; 0 takes the most probable token, with its log-probability at temperature 1.
    """
    B = limit_B.shape[0]
    uniform_BN = _uniform(keys_B, cache.num_tokens, max_tokens)

    def draw(hidden_BD: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BV = module.logits(hidden_BD) / jnp.where(temperature > 0, temperature, 1.0)
        logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
        weights_BV = jnp.exp(logits_BV)
        token_B = jax.lax.cond(
            temperature > 0, lambda: _invert_cdf(weights_BV, uniform_B), lambda: _first_maximum(logits_BV)
        )
        logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        return token_B, logit_B - jnp.log(jnp.sum(weights_BV, axis=-1))

    def unfinished(carry: tuple) -> jax.Array:
        _, _, active_B, _ = carry
        return jnp.any(active_B)

    def one_token(carry: tuple) -> tuple:
        index, cache, active_B, (token_ids, logprobs, num_tokens) = carry
        token_B, logprob_B = draw(cache.hidden_BD, uniform_BN[:, index])
        sampled = Sampled(
            token_ids.at[:, index].set(jnp.where(active_B, token_B, 0)),
            logprobs.at[:, index].set(jnp.where(active_B, logprob_B, 0.0)),
            num_tokens + active_B,
        )
        cache = append(module, blocks, cache, token_B[:, None], active_B[:, None])
        return index + 1, cache, active_B & (token_B != stop_id) & (index + 1 < limit_B), sampled

    empty = Sampled(
        jnp.zeros((B, max_tokens), jnp.int32),
        jnp.zeros((B, max_tokens), jnp.float32),
        jnp.zeros(B, jnp.int32),
    )
    start = (jnp.zeros((), jnp.int32), cache, limit_B > 0, empty)
    _, cache, _, sampled = jax.lax.while_loop(unfinished, one_token, start)
    return cache, sampled


def _uniform(keys_B: jax.Array, first_position_B: jax.Array, num: int) -> jax.Array:
    """f32[B, num] in [0, 1): the noise of each row's next positions."""

    def of(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position))

    positions_BN = first_position_B[:, None] + jnp.arange(num)
    return jax.vmap(jax.vmap(of, in_axes=(None, 0)))(keys_B, positions_BN)


def _invert_cdf(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Tokens with probabilities proportional to `weights`: one uniform number a row, where Gumbel noise takes V.

    The first index whose cumulative weight exceeds u x total; u < 1, so there is one and its weight is not 0.
    """
    cumulative_BV = jnp.cumsum(weights_BV, axis=-1)
    threshold_B = uniform_B * cumulative_BV[:, -1]
    return jnp.sum(cumulative_BV <= threshold_B[:, None], axis=-1, dtype=jnp.int32)


def _first_maximum(logits_BV: jax.Array) -> jax.Array:
    """argmax over logits whose maximum is 0, by a plain minimum: XLA's CPU code for argmax is not vectorised."""
    V = logits_BV.shape[1]
    return jnp.min(jnp.where(logits_BV == 0, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of the given rows, i32[B'], in that order; a row may be repeated (a prompt's siblings).

    With a prefix, the first of equal rows is the one that goes on.
    """
    own = jax.tree.map(lambda x: x[rows] if x.ndim else x, cache._replace(prefix=None))
    return own if cache.prefix is None else own._replace(prefix=cache.prefix._replace(seats=_seated(cache, rows)))


def _seated(cache: Cache, rows: jax.Array) -> Seats:
    assert cache.prefix is not None
    (row_PR, seat_B), last = cache.prefix.seats, len(rows) - 1
    seat_B = seat_B[rows]
    row_PR = jnp.full(row_PR.size, last).at[seat_B].min(jnp.arange(len(rows))).reshape(row_PR.shape)
    return Seats(row_PR, seat_B)


def share(cache: Cache, rows: jax.Array, seats: Seats, num_shared: int) -> Cache:
    """Rows of one prompt each become the prompts of the given `rows`, i32[B]: their first `num_shared` columns, which
    all must have filled, are kept once, and the others are repeated.
    """
    C = num_shared
    own = cache._replace(
        k=tuple(x[..., C:] for x in cache.k),
        v=tuple(x[:, :, C:] for x in cache.v),
        valid=cache.valid[:, C:],
        slot=cache.slot - C,
    )
    prefix = Prefix(tuple(x[..., :C] for x in cache.k), tuple(x[:, :, :C] for x in cache.v), seats)
    return take_rows(own, rows)._replace(prefix=prefix)


def compact(cache: Cache, longest: jax.Array) -> Cache:
    """Move every row's valid columns to the front, so that the slot is the longest row's length.

    Rows of more than `longest` tokens have ended and are emptied.
    """
    kept_B = cache.num_tokens <= longest
    valid = cache.valid & kept_B[:, None]
    order = jnp.argsort(~valid, axis=1, stable=True)
    return cache._replace(
        k=tuple(jnp.take_along_axis(x, order[:, None, None, :], axis=3) for x in cache.k),
        v=tuple(jnp.take_along_axis(x, order[:, None, :, None], axis=2) for x in cache.v),
        valid=jnp.take_along_axis(valid, order, axis=1),
        num_tokens=jnp.where(kept_B, cache.num_tokens, 0),
        slot=jnp.maximum(jnp.max(cache.num_tokens, where=kept_B, initial=0) - cache.num_shared, 0),
    )


class Decoder:
    """The jitted programs of one model, one per shape. `weights` come from `prepare`."""

    def __init__(self, model: Qwen3, max_tokens: int, stop_id: int) -> None:
        def append_tokens(weights: Params, cache: Cache, token_ids: jax.Array, ok: jax.Array) -> Cache:
            return append(*model.bind_unstacked(weights), cache, token_ids, ok)

        def decode_turn(
            weights: Params, cache: Cache, limits: jax.Array, seeds: jax.Array, temperature: jax.Array
        ) -> tuple[Cache, Sampled]:
            keys = jax.vmap(jax.random.key)(seeds)
            return decode(*model.bind_unstacked(weights), cache, limits, keys, temperature, max_tokens, stop_id)

        self.max_tokens = max_tokens
        self.prepare = jax.jit(model.unstack)
        self.empty = jax.jit(partial(empty_cache, model.config), static_argnums=(0, 1))
        self.append = jax.jit(append_tokens, donate_argnums=1)
        self.decode = jax.jit(decode_turn, donate_argnums=1)
        self.take_rows = jax.jit(take_rows)
        self.share = jax.jit(share, static_argnums=3)
        self.compact = jax.jit(compact, donate_argnums=0)

    def num_programs(self) -> int:
        """How many shapes have been compiled: it must not grow after the first step."""
        rows = (self.take_rows, self.share, self.compact)
        functions: tuple[Any, ...] = (self.prepare, self.empty, self.append, self.decode, *rows)
        return sum(function._cache_size() for function in functions)

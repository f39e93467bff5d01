"""The oracle: matrix products counted in the traced program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jorch.flops import train_flops
from jorch.model.transformer import Qwen3


def dot_flops(jaxpr: Any) -> int:
    """2 x output size x contracted size over every dot_general, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += repeats * dot_flops(inner)
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("T", [16, 48])
def test_forward_is_a_third_of_the_dense_equivalent(T, tied, tiny_config):
    config = tiny_config(tie_word_embeddings=tied, num_hidden_layers=3)
    model = Qwen3(config)

    def logits(params, token_ids_BT):
        module = model.bind(params)
        positions_BT = jnp.broadcast_to(jnp.arange(T), token_ids_BT.shape)
        return module.logits(module.hidden(token_ids_BT, positions_BT, jnp.full_like(token_ids_BT, T)))

    traced = jax.make_jaxpr(logits)(model.abstract_params(), jax.ShapeDtypeStruct((2, T), jnp.int32))
    assert 3 * dot_flops(traced.jaxpr) == train_flops(config, 2 * T, 2 * T * T)


def test_a_causal_row_has_half_the_pairs_and_the_diagonal(tiny_config):
    config, T = tiny_config(), 32
    none = train_flops(config, T, 0)
    causal, dense = (train_flops(config, T, pairs) - none for pairs in (T * (T + 1) / 2, T * T))
    assert causal / dense == (T + 1) / (2 * T)

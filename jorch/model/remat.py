"""What the backward pass keeps of a layer's forward pass, and what it computes again (config key `remat`)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jorch.model.attention import SAVED_NAME
from jorch.sections import Remat

_INPUT_NAME = "layer_input"


def named_input(x_BTD: jax.Array) -> jax.Array:
    """A layer's input, so that it can be told apart from everything else that the layer computes."""
    return checkpoint_name(x_BTD, _INPUT_NAME)


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, which calls `named_input`, as the policy has it. Raises ValueError where the backend cannot offload."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer)
        case "save_attention":
            return jax.checkpoint(layer, policy=policies.save_only_these_names(SAVED_NAME))
        case "offload":
            check_host_memory(jax.devices()[0])
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[_INPUT_NAME],
                offload_src="device",
                offload_dst="pinned_host",
            )
            return jax.checkpoint(layer, policy=policy)


def check_host_memory(device: Any) -> None:
    """Raises ValueError where a device cannot reach the host's memory."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise ValueError(
            f"remat=offload needs memory of kind pinned_host, and {device.device_kind} has {', '.join(kinds)}; "
            "set remat to full or save_attention"
        )

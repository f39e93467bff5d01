"""Bytes per device of a train step, term by term.

Parameters, moments and gradients are exact: the real state's shapes under the real shardings. Activations and logits
are estimates of what XLA keeps alive at the worst moment; `compile.py` asks XLA itself where it can.

Letters: B rows and T tokens of a micro-batch, D model, F MLP, N query and K key-value heads, H head dim, V vocabulary,
L layers.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3, Trainable
from jorch.plan.job import Job
from jorch.sections import CONTEXT_TOKENS, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from jorch.sharding import MESH_AXES, mesh_shape
from jorch.train.logprobs import CHUNK_TOKENS
from jorch.train.optimizer import make_optimizer
from jorch.train.state import abstract_state

Attention = Literal["dense", "tiled"]
"""dense: the scores [B, N, T, T] exist whole (kernels' "reference"); tiled: never."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float
    """Trained and frozen."""
    optimizer_state: float
    reference: float
    gradients: float
    """Their sum over the micro-batches so far, in float32."""
    saved_activations: float
    """What all layers keep for the backward pass."""
    layer_backward: float
    """What the backward pass of one layer needs beside that, the gradients of the micro-batch at hand included."""
    logits: float
    """What the loss needs; it is over before the first layer's backward pass begins."""

    @property
    def total(self) -> float:
        """At the worst moment, which is either in the loss or in a layer's backward pass."""
        kept = self.parameters + self.optimizer_state + self.reference + self.gradients + self.saved_activations
        return kept + max(self.layer_backward, self.logits)


def memory(job: Job, num_devices: int, attention: Attention) -> Memory:
    """Raises ValueError where the mesh does not cover the devices, or a size does not divide over it."""
    # Frozen models are hashable, which pyright does not see.
    # Rematerialisation changes nothing in the state, whose shapes take a moment to find out.
    key: Any = job.model.model_copy(update={"remat": "none"}), job.lora, job.optimizer, job.mesh
    trained, frozen, optimizer_state, gradients = _state_bytes(*key, num_devices)
    _check_batch(job, num_devices)
    saved, backward = _activation_bytes(job, num_devices, attention)
    return Memory(
        parameters=trained + frozen,
        optimizer_state=optimizer_state,
        reference=trained if job.with_reference else 0.0,
        gradients=gradients,
        saved_activations=saved,
        layer_backward=backward + trained,
        logits=_logit_bytes(job),
    )


@cache
def _state_bytes(
    model: ModelConfig, lora: LoraConfig | None, optimizer: OptimizerConfig, mesh: MeshConfig, num_devices: int
) -> tuple[float, float, float, float]:
    """(trained parameters, frozen ones, optimizer state, float32 gradients) on the fullest device."""
    abstract_mesh = AbstractMesh(mesh_shape(mesh, num_devices), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))
    shardable: Any = abstract_mesh  # shardings need its shape alone
    key: Any = model, lora
    (base, trained), rule = _models(*key), make_optimizer(optimizer, 1000)
    state = abstract_state(trained, rule, shardable)
    frozen = _bytes(abstract_state(base, rule, shardable).params) if lora else 0.0
    in_float32 = jax.tree.map(lambda x: x.update(dtype=jnp.float32), state.params)
    return _bytes(state.params), frozen, _bytes(state.opt_state), _bytes(in_float32)


@cache
def _models(model: ModelConfig, lora: LoraConfig | None) -> tuple[Qwen3, Trainable]:
    """The whole one and what is trained; one pair for all meshes and optimizers, since they take a moment to make."""
    base = Qwen3(model)
    return base, LoraQwen3(base, lora) if lora else base


def _bytes(tree: object) -> float:
    return float(sum(x.dtype.itemsize * _size(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _check_batch(job: Job, num_devices: int) -> None:
    data, fsdp, context, _ = mesh_shape(job.mesh, num_devices)
    if job.batch.micro_rows % (data * fsdp):
        raise ValueError(
            f"batch.micro_rows={job.batch.micro_rows} does not divide over data x fsdp = {data * fsdp}: "
            f"set it to a multiple of {data * fsdp}"
        )
    if context > 1 and job.batch.row_tokens % (CONTEXT_TOKENS * context):
        raise ValueError(f"batch.row_tokens={job.batch.row_tokens} is not a multiple of {CONTEXT_TOKENS} x context")


def _activation_bytes(job: Job, num_devices: int, attention: Attention) -> tuple[float, float]:
    """(what the layers save for the backward pass, what one layer's backward pass needs beside that)."""
    model, tensor = job.model, job.mesh.tensor
    data, fsdp, context, _ = mesh_shape(job.mesh, num_devices)
    D, F, H, L = model.hidden_size, model.intermediate_size, model.head_dim, model.num_hidden_layers
    N, K = model.num_attention_heads, model.num_key_value_heads
    width = jnp.dtype(model.compute_dtype).itemsize
    rows = job.batch.micro_rows // (data * fsdp)
    tokens = rows * job.batch.row_tokens // context
    # Residual stream, norms and their float32 statistics; q, k, v before and after norm and rope; gate, up, product.
    inside = tokens * width * (6 * D + (4 * N + 6 * K) * H / tensor + 4 * F / tensor)
    scores = 0.0
    if attention == "dense":
        # float32 scores, weights and their gradient, and the weights in the compute dtype, over all keys.
        scores = (3 * 4 + width) * tokens * job.batch.row_tokens * N / tensor
    layer = (D * (N + 2 * K) * H + N * H * D + 3 * D * F) / tensor
    # FSDP gathers a layer in the compute dtype; its gradients, if it has any, exist whole before they are scattered.
    gathered = layer * (width + 4) if fsdp > 1 and not job.lora else layer * width
    inputs = tokens * width * D
    match model.remat:
        case "none":
            return L * (inside + scores), scores + gathered
        case "full":
            return L * inputs, inside + scores + gathered
        case "save_attention":
            # The outputs of attention, and for tiles float32 log-sum-exps.
            outputs = tokens * N / tensor * (H * width + 4)
            return L * (inputs + outputs), inside + scores + gathered
        case "offload":
            # One layer's inputs are at work while the next ones travel.
            return 2 * inputs, inside + scores + gathered


def _logit_bytes(job: Job) -> float:
    """Logits of a chunk in float32, and the unembedding gathered over fsdp with its gradient."""
    model, tensor = job.model, job.mesh.tensor
    # A chunk is of the whole micro-batch: its logits are sharded over the vocabulary only.
    chunk = min(job.batch.micro_rows * job.batch.row_tokens, CHUNK_TOKENS)
    gradient = 0 if job.lora else 4
    unembedding = model.vocab_size * model.hidden_size / tensor * (jnp.dtype(model.output_dtype).itemsize + gradient)
    return 4 * chunk * model.vocab_size / tensor + unembedding

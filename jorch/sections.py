"""The sections that configurations of stages are made of, frozen, with the checks across their own fields."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Remat = Literal["none", "full", "save_attention", "offload"]
_REMAT = (
    "what the backward pass recomputes. full: layers, from their inputs; save_attention: all of them but attention; "
    "offload: as full, with the inputs in the host's memory"
)
RematKey = Annotated[Remat, Field(description=_REMAT)]
Dtype = Literal["float32", "bfloat16"]
ParamDtypeKey = Annotated[Dtype, Field(description="of stored parameters")]
ComputeDtypeKey = Annotated[Dtype, Field(description="of activations")]
LogitDtypeKey = Annotated[
    Dtype | None,
    Field(description="of what logits are products of, summed in float32 always; null = as compute_dtype"),
]
PeakFlopsKey = Annotated[
    PositiveFloat | None,
    Field(description="FLOP/s of one device, of which MFU is the share; null = by its name (jorch/flops.py), if known"),
]

COMPUTATION = ("param_dtype", "compute_dtype", "logit_dtype", "remat")
"""How a model's mathematics is computed; two models that differ in nothing else are the same."""


def computation(section: Section) -> dict[str, Any]:
    """Those keys of a section that say how a model is computed, for `ModelConfig`."""
    return section.model_dump(include=set(COMPUTATION))


class ModelConfig(Section):
    """The Qwen3 dense architecture; names follow Hugging Face's config.json, letters follow the README."""

    vocab_size: PositiveInt = Field(description="V, rows of the embedding, padding rows included")
    hidden_size: PositiveInt = Field(description="D")
    intermediate_size: PositiveInt = Field(description="F, width of the SwiGLU MLP")
    num_hidden_layers: PositiveInt = Field(description="L")
    num_attention_heads: PositiveInt = Field(description="N, query heads")
    num_key_value_heads: PositiveInt = Field(description="K, divides N")
    head_dim: PositiveInt = Field(description="H, even")
    rope_theta: PositiveFloat = Field(default=1e6, description="base of the rotary frequencies")
    rms_norm_eps: PositiveFloat = Field(default=1e-6, description="epsilon of every RMSNorm")
    tie_word_embeddings: bool = Field(default=False, description="unembed with the embedding's transpose")
    max_position_embeddings: PositiveInt = Field(default=40960, description="longest sequence, tokens")
    param_dtype: ParamDtypeKey = "float32"
    compute_dtype: ComputeDtypeKey = "float32"
    logit_dtype: LogitDtypeKey = None
    remat: RematKey = "none"

    def architecture(self) -> dict[str, Any]:
        """What makes two models the same, whatever they are computed in."""
        return self.model_dump(exclude=set(COMPUTATION))

    @property
    def output_dtype(self) -> Dtype:
        """Of the final hidden states and of the unembedding that they are multiplied with."""
        return self.logit_dtype or self.compute_dtype

    @model_validator(mode="after")
    def _heads(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")
        return self


class TokenizerConfig(Section):
    kind: Literal["sentencepiece", "huggingface"] = Field(default="sentencepiece", description="library that reads it")
    path: str = Field(description="a .model file (sentencepiece) or a folder with tokenizer.json")


class ChatConfig(Section):
    """How messages become tokens."""

    style: Literal["compact", "qwen3"] = Field(
        default="compact",
        description="compact: messages only, one line an observation; qwen3: system block with tools' JSON",
    )
    history: Literal["sampled", "template"] = Field(
        default="sampled",
        description="sampled: turns stay as they were said, so a trajectory is one sample; template: rendered again "
        "each turn, as Qwen3's template does, which drops thoughts once the user speaks and then begins a new sample",
    )

    @model_validator(mode="after")
    def _template(self) -> "ChatConfig":
        if self.history == "template" and self.style != "qwen3":
            raise ValueError("history=template needs style=qwen3, whose template it is")
        return self


class MeshConfig(Section):
    """Devices along each mesh axis; data=-1 takes what is left."""

    data: int = Field(default=-1, description="replicas; -1 = all remaining devices")
    fsdp: PositiveInt = Field(default=1, description="shards of parameters and optimizer state")
    context: PositiveInt = Field(default=1, description="shards of the sequence")
    tensor: PositiveInt = Field(default=1, description="shards of heads, MLP and vocabulary")


Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]


class LoraConfig(Section):
    """Train low-rank additions to frozen matrices, W + (alpha / rank) A B (LoRA, arXiv 2106.09685)."""

    rank: PositiveInt = Field(default=16, description="R, columns of A and rows of B")
    alpha: PositiveFloat = Field(default=32.0, description="the addition is scaled by alpha / rank")
    targets: tuple[Matrix, ...] = Field(
        default=("q", "k", "v", "o", "gate", "up", "down"), min_length=1, description="matrices of every layer"
    )


class OptimizerConfig(Section):
    kind: Literal["adam", "adafactor", "muon"] = Field(
        default="adam", description="adafactor: factored second moments; muon: matrices by Muon, the rest by Adam"
    )
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the first moments of adam and muon; second ones are always float32"
    )
    learning_rate: PositiveFloat = Field(description="peak; Adam's")
    muon_learning_rate: PositiveFloat = Field(default=0.02, description="peak; of matrices under muon")
    schedule: Literal["constant", "cosine", "linear"] = Field(default="constant", description="after warm-up")
    final_fraction: float = Field(default=0.05, ge=0, le=1, description="of the peak, at the last step")
    warmup_steps: int = Field(default=0, ge=0, description="linear from 0")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Adam's decay of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled (AdamW)")
    clip_norm: PositiveFloat = Field(default=1.0, description="global gradient norm")
    max_nonfinite_steps: PositiveInt = Field(default=5, description="consecutive skipped updates before stopping")


class BatchConfig(Section):
    """The fixed shape that every train step sees: [M, B, T]. M follows from the worst case (one row a
    sample); micro-batches that stay empty cost nothing."""

    row_tokens: PositiveInt = Field(description="T, tokens of a packed row")
    micro_rows: PositiveInt = Field(description="B, rows of a micro-batch, over all devices")


class VllmConfig(Section):
    """Servers started by `jorch serve DIR --rl`, or one of the run's own."""

    urls: tuple[str, ...] = Field(
        default=(), description="http://HOST:PORT of each server; none = start one ($JORCH_VLLM, or vllm on PATH)"
    )
    weights_dir: str | None = Field(
        default=None, description="folder for new weights that all servers can read; null = OUT/weights"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="in which the servers compute")
    request_timeout_s: PositiveFloat = Field(default=600.0, description="of one completion, retries included")


class SamplerConfig(Section):
    max_rows: PositiveInt = Field(default=128, description="trajectories decoded together, over all lanes")
    lanes: PositiveInt = Field(
        default=1, description="batches decoded side by side: one per CPU core; 1 on an accelerator"
    )
    max_context_tokens: PositiveInt = Field(description="columns of the KV cache")
    prefill_chunk_tokens: PositiveInt = Field(default=128, description="longest block appended in one program")
    max_wait_s: float | None = Field(
        default=None,
        description="decode without stragglers after this many seconds; null = wait for all (reproducible)",
    )
    vllm: VllmConfig | None = Field(default=None, description="sample with vLLM servers instead of in this process")


class OrchestratorPrice(Section):
    """What the orchestrator's own tokens add to the cost and latency of a trajectory."""

    usd_per_million_input_tokens: float = Field(default=0.0, ge=0, description="of all turns' prompts")
    usd_per_million_cached_tokens: float | None = Field(
        default=None, ge=0, description="of what a prompt shares with the turn before; null = as other input (paper)"
    )
    usd_per_million_output_tokens: float = Field(default=0.0, ge=0, description="of what it samples")
    seconds_per_output_token: float = Field(default=0.0, ge=0, description="modelled, added to the latency")


class RolloutConfig(Section):
    max_turns: PositiveInt = Field(default=50, description="completions per trajectory (paper: 50)")
    max_tokens_per_turn: PositiveInt = Field(description="sampled tokens per completion")
    max_prompt_tokens: PositiveInt = Field(default=24000, description="first prompt; longer ones lose their middle")
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    max_malformed_calls: PositiveInt = Field(
        default=3,
        description="the trajectory ends as invalid at this many; before that each is an observation",
    )
    call_timeout_s: PositiveFloat = Field(default=120.0, description="of one tool request, retries apart")
    call_retries: int = Field(default=3, ge=0, description="after network failures, with exponential back-off")
    trajectory_retries: int = Field(default=1, ge=0, description="fresh attempts after an infrastructure failure")
    group_deadline_s: PositiveFloat | None = Field(default=None, description="who takes longer is named and left out")
    orchestrator: OrchestratorPrice = OrchestratorPrice()


class RewardConfig(Section):
    """The group reward (paper section 3): min-max features dotted with the preference, 0 if unsolved."""

    invalid_reward: float = Field(default=-0.25, le=0, description="of a trajectory that is malformed or cut off")


class AlgorithmConfig(Section):
    """The policy-gradient loss as independent choices."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = Field(
        default="grpo", description="grpo: (R-mean)/std; dr_grpo: R-mean; rloo: R - mean of the others"
    )
    max_abs_advantage: PositiveFloat = Field(default=3.0, description="clip")
    min_group_std: float = Field(default=0.1, ge=0, description="groups at or below it teach nothing and are dropped")
    drop_invalid: bool = Field(default=True, description="leave malformed trajectories out of the loss")
    drop_unanswered: bool = Field(default=True, description="leave trajectories without a verdict out of the loss")
    ratio: Literal["token", "sequence"] = Field(default="token", description="sequence: GSPO's length-normalised ratio")
    clip: Literal["symmetric", "asymmetric", "dual"] = Field(
        default="asymmetric",
        description="symmetric: clip_low both ways; dual: asymmetric, and bounded where A < 0",
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="the ratio is clipped below 1 - clip_low")
    clip_high: PositiveFloat = Field(default=0.28, description="and above 1 + clip_high")
    dual_clip: float = Field(default=10.0, gt=1, description="bound on ratio where A < 0, clip: dual only")
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = Field(
        default="token_mean",
        description="over the global batch: all tokens; mean over sequences of token means; or of token sums",
    )
    kl_coefficient: float = Field(default=0.0, ge=0, description="of the penalty to the reference policy")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="with d = log pi - log reference: k1 d; k2 d^2/2; k3 exp(-d) - 1 + d"
    )
    entropy_coefficient: float = Field(default=0.0, ge=0, description="of the bonus")
    importance_cap: float | None = Field(
        default=2.0, gt=0, description="truncated importance weight trainer/sampler; null = off"
    )


class WatchConfig(Section):
    """When `jorch rl` says on the terminal that something looks wrong; it goes on."""

    log_ratio_nats: PositiveFloat | None = Field(
        default=1.0, description="1st or 99th percentile of log(trainer / sampler) further from 0; null = never"
    )
    tool_call_fraction: float | None = Field(
        default=0.5, gt=0, lt=1, description="tool calls a turn below this part of their median so far; null = never"
    )


class ServerSection(Section):
    """Where the tool server is: an address, or a config from which this run starts its own."""

    url: str | None = Field(
        default=None,
        description="of a running server, e.g. http://127.0.0.1:8900; {process} stands for each process's number",
    )
    config: str | None = Field(default=None, description="YAML for a server of this run's own, on a free port")
    token: None = Field(default=None, description="never here: set JORCH_TOOLS_TOKEN")

    @model_validator(mode="after")
    def _one(self) -> "ServerSection":
        if (self.url is None) == (self.config is None):
            raise ValueError("set exactly one of tools_server.url and tools_server.config")
        return self


CONTEXT_TOKENS = 8
"""A device's part of a row that devices share is a multiple of this."""


class CheckpointConfig(Section):
    every_steps: PositiveInt = Field(default=1, description="asynchronous save interval")
    keep: PositiveInt = Field(default=2, description="latest checkpoints kept")
    best_metric: str | None = Field(
        default=None, description="also keep the best one by this metric (jorch/metrics.py)"
    )
    best_is: Literal["highest", "lowest"] = Field(default="highest", description="which value of it is best")
    ocdbt: bool = Field(default=True, description="pack all arrays of a process into one database, not a file a chunk")


class MiniatureConfig(Section):
    """Tasks of the miniature world (synth/miniature.py)."""

    seed: int = Field(default=0, description="of the tasks")
    num_train: PositiveInt = Field(default=4096, description="tasks for training")
    num_validation: PositiveInt = Field(default=256, description="tasks for choices made during development")
    num_heldout: PositiveInt = Field(default=2048, description="with expert profiles never seen in training")

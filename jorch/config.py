"""Every configuration model, frozen, with its cross-field checks. Needs no jax: validation comes first.

One model per stage: SftConfig, RlConfig, EvalConfig, QuickstartConfig. A YAML file fills one; dotted
overrides on the command line change single keys (`config_io.py`). Units stand in the names.
"""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jorch.config_algorithm import AlgorithmConfig, RewardConfig, Section

Remat = Literal["none", "full", "save_attention", "offload"]


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
    param_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of stored parameters")
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of activations")
    remat: Remat = Field(
        default="none",
        description="what the backward pass recomputes. full: layers, from their inputs; save_attention: all of them "
        "but attention; offload: as full, with the inputs in the host's memory",
    )

    def architecture(self) -> dict[str, Any]:
        """What makes two models the same, whatever they are computed in."""
        return self.model_dump(exclude={"param_dtype", "compute_dtype", "remat"})

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
    orchestrator_usd_per_million_tokens: float = Field(default=0.0, ge=0, description="added to a trajectory's cost")
    orchestrator_seconds_per_token: float = Field(default=0.0, ge=0, description="modelled, added to its latency")


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


def _check_rows(batch: BatchConfig, mesh: MeshConfig) -> None:
    parts = CONTEXT_TOKENS * mesh.context
    if mesh.context > 1 and batch.row_tokens % parts:
        raise ValueError(
            f"mesh.context={mesh.context} cannot split batch.row_tokens={batch.row_tokens}: it must be a multiple of "
            f"{parts}, best of {256 * mesh.context}"
        )


def _check_lora(lora: LoraConfig | None, optimizer: OptimizerConfig) -> None:
    if lora is not None and optimizer.kind == "muon":
        raise ValueError("optimizer.kind=muon is for whole matrices; with lora, set optimizer.kind to adam")


def _check_context(sampler: SamplerConfig, rollout: RolloutConfig) -> None:
    if rollout.max_prompt_tokens + rollout.max_tokens_per_turn > sampler.max_context_tokens:
        raise ValueError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_tokens_per_turn="
            f"{rollout.max_tokens_per_turn} exceed sampler.max_context_tokens={sampler.max_context_tokens}: "
            "long prompts could not be answered"
        )


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


class SftConfig(Section):
    """`jorch sft`: behaviour cloning."""

    out: str = Field(description="run folder")
    seed: int = Field(default=0, description="of every random choice of the run")
    init_from: str | None = Field(default=None, description="folder of safetensors to start from; null = random")
    model: ModelConfig | None = Field(default=None, description="needed where init_from is null")
    tokenizer: TokenizerConfig | None = Field(default=None, description="null: train one on the miniature world")
    chat: ChatConfig = ChatConfig()
    demonstrations: str = Field(description='JSONL of {"messages": [...]}, or "miniature"')
    rule_fraction: float = Field(default=0.65, ge=0, le=1, description="miniature: demonstrations that obey a rule")
    steps: PositiveInt = Field(description="optimizer steps")
    rows_per_step: PositiveInt = Field(default=64, description="demonstrations per step")
    batch: BatchConfig
    lora: LoraConfig | None = Field(default=None, description="train an adapter of the frozen weights; null = all")
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=100)
    log_every: PositiveInt = Field(default=20, description="steps between lines of metrics")

    @model_validator(mode="after")
    def _start(self) -> "SftConfig":
        if self.init_from is None and self.model is None:
            raise ValueError("init_from is null, so a model section with the dimensions is needed")
        if self.init_from is None and self.lora is not None:
            raise ValueError("init_from is null; lora adapts trained weights, so set init_from to their folder")
        _check_rows(self.batch, self.mesh)
        _check_lora(self.lora, self.optimizer)
        best = self.checkpoint.best_metric
        if best is not None and not best.startswith("train/"):
            raise ValueError(
                f"checkpoint.best_metric={best!r} is not measured by sft, which has train/loss and the like"
            )
        return self


class RlConfig(Section):
    """`jorch rl`: group-relative policy optimisation on multi-turn rollouts."""

    out: str = Field(description="run folder")
    seed: int = Field(default=0, description="of every random choice of the run")
    init_from: str = Field(description='folder of Hugging Face safetensors, or "base" (ships with jorch)')
    chat: ChatConfig = ChatConfig()
    tasks: str = Field(description="JSONL of tasks, jorch's or ToolScale's")
    tools_server: ServerSection
    steps: PositiveInt = Field(description="policy updates")
    tasks_per_step: PositiveInt = Field(default=16, description="groups per step (paper: 16)")
    group_size: PositiveInt = Field(default=8, ge=2, description="sibling trajectories per task (paper: 8)")
    num_minibatches: PositiveInt = Field(default=1, description="optimizer updates per batch of rollouts")
    max_policy_lag: int = Field(
        default=0, ge=0, description="updates; above 0 rollouts go on beside them and no trained token is older"
    )
    sampler: SamplerConfig
    rollout: RolloutConfig
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    batch: BatchConfig
    lora: LoraConfig | None = Field(default=None, description="train an adapter of the frozen weights; null = all")
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_trajectories: int = Field(default=2, ge=0, description="groups written to trajectories.jsonl per step")
    param_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the trained parameters")
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of activations")
    remat: Remat = Field(
        default="none",
        description="what the backward pass recomputes. full: layers, from their inputs; save_attention: all of them "
        "but attention; offload: as full, with the inputs in the host's memory",
    )

    @model_validator(mode="after")
    def _fits(self) -> "RlConfig":
        if self.tasks_per_step % self.num_minibatches:
            raise ValueError(
                f"tasks_per_step={self.tasks_per_step} is not a multiple of num_minibatches={self.num_minibatches}"
            )
        _check_rows(self.batch, self.mesh)
        _check_lora(self.lora, self.optimizer)
        _check_context(self.sampler, self.rollout)
        if self.sampler.max_context_tokens > self.batch.row_tokens:
            raise ValueError(
                f"sampler.max_context_tokens={self.sampler.max_context_tokens} is larger than "
                f"batch.row_tokens={self.batch.row_tokens}: a trajectory might not fit a row"
            )
        if self.max_policy_lag and self.algorithm.importance_cap is None:
            raise ValueError("max_policy_lag > 0 trains on tokens of older weights: set algorithm.importance_cap")
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature=0 gives identical siblings; RL needs temperature > 0")
        return self


class EndpointConfig(Section):
    """A model that others serve, limits as for tool calls, `sampler.max_rows` tasks at once; $JORCH_ENDPOINT_KEY."""

    url: str = Field(description="up to and without /chat/completions, e.g. http://127.0.0.1:8100/v1")
    model: str | None = Field(default=None, description="its name; null = the first that the endpoint lists")


class EvalConfig(Section):
    """`jorch eval`: play tasks with a policy and report."""

    out: str = Field(description="run folder")
    seed: int = Field(default=0, description="of every random choice of the run")
    policy: Literal["model", "gold"] = Field(
        default="model", description="gold: replays the task's own reference calls"
    )
    init_from: str | None = Field(default=None, description='folder of safetensors, or "base"; policy: model only')
    endpoint: EndpointConfig | None = Field(default=None, description="plays instead of a model of init_from")
    chat: ChatConfig = ChatConfig()
    tasks: str = Field(description='JSONL of tasks, or "tau2:airline", "tau2:retail", ... (extra tau2)')
    limit: PositiveInt | None = Field(default=None, description="first tasks only")
    tools_server: ServerSection
    temperatures: tuple[float, ...] = Field(default=(0.0,), min_length=1, description="0 = greedy")
    sampler: SamplerConfig
    rollout: RolloutConfig
    mesh: MeshConfig = MeshConfig()
    baselines: bool = Field(default=False, description="add the miniature world's baselines")
    param_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the parameters")
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of activations")

    @model_validator(mode="after")
    def _policy(self) -> "EvalConfig":
        if self.policy == "model" and self.init_from is None and self.endpoint is None:
            raise ValueError("policy: model needs init_from or endpoint")
        _check_context(self.sampler, self.rollout)
        return self


class QuickstartConfig(Section):
    """`jorch quickstart`: the whole loop on the miniature world.

    The run fills in what depends on its folder and seed: rl.out, rl.seed, rl.tasks, rl.init_from, rl.tools_server.
    """

    out: str = Field("runs/quickstart", description="run folder")
    seed: int = Field(0, description="of tasks, sampling and order")
    base: str = Field("quickstart_base.yaml", description="recipe of the base, for --from-scratch")
    miniature: MiniatureConfig = MiniatureConfig()
    rl: RlConfig

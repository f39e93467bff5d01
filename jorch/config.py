"""Every configuration model, frozen, with its cross-field checks. Needs no jax: validation comes first.

One model per stage: SftConfig, RlConfig, EvalConfig, QuickstartConfig. A YAML file fills one; dotted
overrides on the command line change single keys (`config_io.py`). Units stand in the names.
"""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jorch.sections import (
    CONTEXT_TOKENS,
    AlgorithmConfig,
    BatchConfig,
    ChatConfig,
    CheckpointConfig,
    ComputeDtypeKey,
    LogitDtypeKey,
    LoraConfig,
    MeshConfig,
    MiniatureConfig,
    ModelConfig,
    OptimizerConfig,
    ParamDtypeKey,
    PeakFlopsKey,
    RematKey,
    RewardConfig,
    RolloutConfig,
    SamplerConfig,
    Section,
    ServerSection,
    TokenizerConfig,
    WatchConfig,
)


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
    peak_flops: PeakFlopsKey = None

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
    watch: WatchConfig = WatchConfig()
    log_trajectories: int = Field(default=2, ge=0, description="groups written to trajectories.jsonl per step")
    peak_flops: PeakFlopsKey = None
    param_dtype: ParamDtypeKey = "float32"
    compute_dtype: ComputeDtypeKey = "float32"
    logit_dtype: LogitDtypeKey = None
    remat: RematKey = "none"

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


class ServeConfig(Section):
    """`jorch serve`: one vLLM server for an exported model. Every key is an option as well."""

    folder: str = Field(description="exported model, as `jorch export` writes it")
    rl: bool = Field(default=False, description="token endpoint and weight updates; loopback only")
    vllm: str | None = Field(default=None, description="the vllm executable; null = $JORCH_VLLM, or the PATH's")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8100, ge=0, le=65535, description="port to listen on, 0 = a free one")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of weights and activations")
    max_context_tokens: PositiveInt = Field(default=4096, description="tokens of prompt and completion")
    max_rows: PositiveInt = Field(default=64, description="requests decoded together")
    kv_cache_bytes: PositiveInt | None = Field(
        default=None, description="memory of the KV cache; null = 256 MiB on a CPU, else vLLM's choice"
    )
    lora_rank: PositiveInt | None = Field(
        default=None, description="take a run's adapters up to this rank beside the folder's frozen weights; with rl"
    )
    start_timeout_s: PositiveFloat = Field(default=600.0, description="seconds until it must be ready")
    log: str = Field(default="vllm.log", description="file for vLLM's output, appended")
    vllm_options: tuple[str, ...] = Field(default=(), description="for `vllm serve` as they are; also what follows --")


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
    param_dtype: ParamDtypeKey = "float32"
    compute_dtype: ComputeDtypeKey = "float32"
    logit_dtype: LogitDtypeKey = None

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

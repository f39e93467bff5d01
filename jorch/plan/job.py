"""What a plan needs to know of a config, whichever stage it is for."""

from dataclasses import dataclass
from pathlib import Path

from jorch.config import RlConfig, SftConfig
from jorch.sections import (
    AlgorithmConfig,
    BatchConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    computation,
)

_COMMON = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6}
PUBLISHED = {
    name: ModelConfig(
        **_COMMON,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        tie_word_embeddings=tied,
    )
    for name, D, F, L, N, tied in (
        ("Qwen3-0.6B", 1024, 3072, 28, 16, True),
        ("Qwen3-1.7B", 2048, 6144, 28, 16, True),
        ("Qwen3-4B", 2560, 9728, 36, 32, True),
        ("Qwen3-8B", 4096, 12288, 36, 32, False),
        ("Qwen3-14B", 5120, 17408, 40, 40, False),
        ("Qwen3-32B", 5120, 25600, 64, 64, False),
    )
}
"""The dense Qwen3 models' dimensions, so that a plan needs no download."""


@dataclass(frozen=True)
class Job:
    """A train step to plan."""

    model: ModelConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    mesh: MeshConfig
    num_micro: int
    """Micro-batches of a step, at most."""
    algorithm: AlgorithmConfig | None
    """RL's loss; None for SFT's."""
    on_policy: bool
    """RL updates once with a batch of rollouts."""
    lora: LoraConfig | None
    """An adapter is trained, the rest of the model is frozen."""
    model_prefix: str
    """Where the config has the model's settings: "model." in SFT's, "" in RL's."""
    within_row: tuple[tuple[str, int], ...] = ()
    """RL's keys, the sampler's context first, with lengths in tokens that shrink with a row: a trajectory must fit."""
    may_adapt: bool = False
    """There are weights that could stay frozen under an adapter."""

    @property
    def with_reference(self) -> bool:
        """RL with a KL penalty keeps the initial parameters."""
        return self.algorithm is not None and self.algorithm.kl_coefficient > 0


def job_of(config: SftConfig | RlConfig) -> Job:
    """Raises ValueError where the model's dimensions are not to be found."""
    rows = config.rows_per_step if isinstance(config, SftConfig) else _rows_per_update(config)
    num_micro = -(-rows // config.batch.micro_rows)
    rl = isinstance(config, RlConfig)
    return Job(
        _model(config),
        config.optimizer,
        config.batch,
        config.mesh,
        num_micro,
        config.algorithm if rl else None,
        rl and config.num_minibatches == 1,
        config.lora,
        "model." if isinstance(config, SftConfig) else "",
        _within_row(config),
        config.init_from is not None and config.optimizer.kind != "muon",
    )


def _within_row(config: SftConfig | RlConfig) -> tuple[tuple[str, int], ...]:
    if isinstance(config, SftConfig):
        return ()
    return (
        ("sampler.max_context_tokens", config.sampler.max_context_tokens),
        ("rollout.max_prompt_tokens", config.rollout.max_prompt_tokens),
        ("rollout.max_tokens_per_turn", config.rollout.max_tokens_per_turn),
    )


def _rows_per_update(config: RlConfig) -> int:
    return config.tasks_per_step * config.group_size // config.num_minibatches


def _model(config: SftConfig | RlConfig) -> ModelConfig:
    own = config.model if isinstance(config, SftConfig) else None
    settings = computation(own or config)
    if config.init_from is None:
        assert own is not None
        return own
    if config.init_from == "base" or Path(config.init_from).is_dir():
        from jorch.export import hf, pretrained

        return hf.load_config(pretrained.folder_of(config.init_from), **settings)
    published = PUBLISHED.get(Path(config.init_from).name)
    if published is None and own is None:
        raise ValueError(
            f"init_from={config.init_from!r} is no folder, and its last part is none of {', '.join(PUBLISHED)}: "
            "a plan needs the model's config.json or one of these names"
        )
    return (published or own).model_copy(update=settings)  # pyright: ignore[reportOptionalMemberAccess]

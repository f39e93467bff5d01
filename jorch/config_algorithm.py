"""What the RL stage maximises and by which loss; `config.py` puts these sections into its stages."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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

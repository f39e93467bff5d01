"""Host records, in the order that the data meets them. Standard library and numpy only.

Task -> Turn (Completion, ToolCall, ToolResult) -> Trajectory -> Group -> Sample -> PackedBatch.
Letters in shapes: M micro-batches, B rows, T positions of a row, n tokens of one record.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Termination = Literal[
    "answered",  # a terminal tool (the `answer` function) was called
    "ended",  # the environment ended the session without an answer (an alias was called again)
    "invalid",  # too many malformed calls
    "max_turns",
    "max_tokens",
    "env_error",  # the environment itself failed: the trajectory counts, with outcome 0
    "infra_error",  # server or network failure after all retries: left out of group statistics
    "deadline",  # not done when its group's time was up: left out of group statistics
]
TERMINATIONS: tuple[Termination, ...] = (
    "answered",
    "ended",
    "invalid",
    "max_turns",
    "max_tokens",
    "env_error",
    "infra_error",
    "deadline",
)


@dataclass(frozen=True, slots=True)
class Task:
    """One problem for the orchestrator, with the tools, prices and preference that hold for it.

    Example:
        Task(task_id="train-000007",
             messages=({"role": "user", "content": "Tools:\\n search-1=skill2 ..."},),
             tools=({"type": "function", "function": {"name": "answer", ...}},),
             environment="experts",
             setup={"model_mapping": {"answer-1": "sim-answer-s3-p5-t2"},
                    "simulation": {"domain": "math", "difficulty": 2, "needs": ["search"]}},
             preference={"outcome": 1.0, "cost": 0.6, "latency": 0.1, "answer-3": -0.5},
             answer=None, domain="math", split="train", truth={"kind": "cheap"})
    """

    task_id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    environment: str
    """Which environment of the tool server plays it: "experts" or "tau2"."""
    setup: dict[str, Any]
    """What that environment needs to start a session; opaque to the trainer."""
    preference: dict[str, float]
    """Weight per feature: "outcome", "cost", "latency", or a tool's billed name. Negative = avoid."""
    answer: str | None
    domain: str
    split: str
    truth: dict[str, Any] = field(default_factory=dict)
    """Facts for baselines and metrics only; neither the policy nor the reward may read them."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What the rollout driver asks of a sampler: continue `prompt_token_ids` until a stop token.

    `trajectory_id` lets an engine keep its KV cache across the turns of one trajectory. `seed` fixes the
    sampling noise of this turn whatever else is in the batch.
    """

    trajectory_id: str
    prompt_token_ids: np.ndarray  # i32[num_prompt], everything so far
    max_tokens: int
    temperature: float  # 0 = greedy
    seed: int  # 0 <= seed < 2**63


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids as sampled, each with its log-probability (nats) at the sampling temperature and the version of the
    weights that drew it: new weights may arrive in the middle.

    Example: Completion(token_ids=i32[7, 19, 9, 2], logprobs=f32[0., -.7, 0., 0.], "stop",
                        policy_versions=i32[3, 3, 3, 4])
    """

    token_ids: np.ndarray  # i32[n], the stop token included
    logprobs: np.ndarray  # f32[n]
    finish_reason: Literal["stop", "length"]
    policy_versions: np.ndarray  # i32[n]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One parsed call. Example: ToolCall("0", "answer", {"model": "answer-2"})."""

    call_id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the tool server answered, or what the driver answers itself to a malformed call (tool="").

    Example: ToolResult("0", "search-2", "documents", cost_usd=.003, latency_s=2., error=None, ended=False)
    """

    call_id: str
    tool: str
    """The billed name: the role alias behind an expert function, else the function's own name."""
    content: str
    cost_usd: float
    latency_s: float
    error: str | None
    ended: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One completion with its calls and their results. `prompt_token_ids` is i32[num_prompt]."""

    prompt_token_ids: np.ndarray
    completion: Completion
    calls: tuple[ToolCall, ...]
    results: tuple[ToolResult, ...]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One attempt at a task. Costs in USD, latencies in seconds, of all tool calls and its own tokens."""

    task_id: str
    trajectory_id: str
    turns: tuple[Turn, ...]
    termination: Termination
    outcome: float
    """The environment's verdict in [0, 1]; 1 = solved."""
    num_malformed: int
    """Calls that did not parse or did not fit the tool's schema."""
    cost_usd: float
    latency_s: float
    tool_counts: dict[str, int]
    """Calls per billed tool name."""

    @property
    def format_valid(self) -> bool:
        """Every call parsed and fitted its tool's schema."""
        return self.num_malformed == 0 and self.termination != "invalid"

    @property
    def judged(self) -> bool:
        """Whether the environment saw the end of it: cut-off and malformed trajectories have no verdict."""
        return self.termination in ("answered", "ended")

    @property
    def lost(self) -> bool:
        """Whether it says nothing about the policy: no member of its group's statistics, nor of the loss."""
        return self.termination in ("infra_error", "deadline")

    @property
    def policy_version_min(self) -> int:
        """Of the weights that drew its tokens; -1 where there are none."""
        return min((int(v) for turn in self.turns for v in turn.completion.policy_versions), default=-1)

    @property
    def policy_version_max(self) -> int:
        return max((int(v) for turn in self.turns for v in turn.completion.policy_versions), default=-1)


@dataclass(frozen=True, slots=True)
class Group:
    """The sibling trajectories of one task; lost siblings are already left out.

    Example: Group(task, (t0, t1), rewards=f32[1.2, 0.], advantages=f32[1., -1.])
    """

    task: Task
    trajectories: tuple[Trajectory, ...]
    rewards: np.ndarray  # f32[group_size]
    advantages: np.ndarray  # f32[group_size]


@dataclass(frozen=True, slots=True)
class Sample:
    """A token sequence to train on. Sampled ids are kept as sampled; nothing is encoded again.

    Example: two turns of one trajectory joined, the observation between them masked:
        Sample(token_ids=i32[5, 6, 9, 2, 8, 9, 2], loss_mask=bool[0, 0, 1, 1, 0, 1, 1],
               logprobs=f32[0, 0, -.1, 0, 0, -.2, 0], advantage=.7, num_copies=1)
    """

    token_ids: np.ndarray  # i32[n]
    loss_mask: np.ndarray  # bool[n], sampled tokens only; never the first token
    logprobs: np.ndarray  # f32[n], the sampler's; 0 where loss_mask is False
    advantage: float
    num_copies: int = 1
    """How many identical siblings this sample stands for; it weighs their loss tokens."""
    policy_versions: np.ndarray | None = None
    """i32[n], of the weights that drew each token, -1 where loss_mask is False; None: nothing was sampled (SFT)."""

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return int(np.argmax(self.loss_mask))


class PackedBatch(NamedTuple):
    """Samples packed into fixed shapes [M, B, T]: M micro-batches of B rows (a pytree without importing jax).

    Siblings may share one copy of their prompt, so a row is a forest: `parents` names each token's
    predecessor, `visible_until` the end of the range of queries that may see a key. Index t always
    describes token t; the shift by one happens once, in `train/logprobs.py`, through `parents`.

    Example row, a prompt [5 6] shared by the answers [9 2] and [7 2], then padding:
        token_ids       5  6  9  2  7  2  0
        positions       0  1  2  3  2  3  0
        segment_ids     1  1  2  2  3  3  0
        parents        -1  0  1  2  1  4 -1
        visible_until   6  6  4  4  6  6  0
        loss_weights    0  0  1  1  1  1  0
    """

    token_ids: Any  # i32
    positions: Any  # i32, of the token within its own sequence
    segment_ids: Any  # i32, 0 = padding; one id per shared prompt and one per sample, unique in a row
    parents: Any  # i32, index in the row of the preceding token; -1 = none
    visible_until: Any  # i32, query q sees key k iff k <= q < visible_until[k]; 0 = padding
    loss_weights: Any  # f32, 0 = not trained, else Sample.num_copies
    advantages: Any  # f32
    sampler_logprobs: Any  # f32
    old_logprobs: Any  # f32, of the policy to which the ratio is taken; packing copies the sampler's
    ref_logprobs: Any  # f32, of the frozen reference; zeros where no KL penalty is on

"""What the rollout driver asks of an engine that continues token sequences, in process or over HTTP."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from jorch.rollout.stats import SamplerStats
from jorch.sections import SamplerConfig
from jorch.types import Completion, CompletionRequest


class Sampler(Protocol):
    """Token ids in, token ids and log-probabilities out; the weights it samples from have a version."""

    config: SamplerConfig
    policy_version: int
    max_context_tokens: int
    stats: SamplerStats
    takes_adapters: bool
    """It holds the base of what is trained, and is given adapters alone."""

    def connected(self) -> AbstractAsyncContextManager[object]:
        """Held around everything that is asked within one event loop."""
        ...

    def expect(self, trajectory_ids: Sequence[str]) -> None:
        """Announce trajectories that are about to ask, so that an engine can batch their first turns."""
        ...

    async def complete(self, request: CompletionRequest) -> Completion:
        """Continue a trajectory. Prompt and sampled tokens together stay within `max_context_tokens`."""
        ...

    def release(self, trajectory_id: str) -> None:
        """The trajectory asks no more; its cache may go."""
        ...

    def publish(self, params: Any, policy_version: int) -> None:
        """Sample from these parameters from now on, an `export.adapter.Adapter` where it takes those; trajectories
        under way go on with them. Blocks.
        """
        ...

    def warm_up(self, append_tokens: int) -> None:
        """Do now what would hold up the first turns; `append_tokens` is the length of a usual observation."""
        ...

    def close(self) -> None: ...

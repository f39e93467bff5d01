"""What the rollout driver asks of an engine that continues token sequences, in process or over HTTP."""

from collections.abc import Sequence
from typing import Protocol

from jorch.types import Completion, CompletionRequest


class Sampler(Protocol):
    """Token ids in, token ids and log-probabilities out; the weights it samples from have a version."""

    policy_version: int
    max_context_tokens: int

    def expect(self, trajectory_ids: Sequence[str]) -> None:
        """Announce trajectories that are about to ask, so that an engine can batch their first turns."""
        ...

    async def complete(self, request: CompletionRequest) -> Completion:
        """Continue a trajectory. Prompt and sampled tokens together stay within `max_context_tokens`."""
        ...

    def release(self, trajectory_id: str) -> None:
        """The trajectory asks no more; its cache may go."""
        ...

"""What the orchestrator's own tokens add to the bill of its trajectory (paper section 3: priced like its tools)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jorch.sections import OrchestratorPrice
from jorch.types import Turn


class OwnTokens(NamedTuple):
    """Over all turns, prompts anew for each. `cached`: those of a prompt that the turn before held already."""

    input: int = 0
    cached: int = 0
    output: int = 0

    def cost_usd(self, price: OrchestratorPrice) -> float:
        cached_price = price.usd_per_million_cached_tokens
        if cached_price is None:
            cached_price = price.usd_per_million_input_tokens
        return (
            self.input * price.usd_per_million_input_tokens
            + self.cached * cached_price
            + self.output * price.usd_per_million_output_tokens
        ) / 1e6

    def latency_s(self, price: OrchestratorPrice) -> float:
        return self.output * price.seconds_per_output_token

    def with_usage(self, usage: Mapping[str, Any]) -> "OwnTokens":
        """And those of one answer's `usage`, as OpenAI's API counts them; what it does not say is 0."""
        prompt, output = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return OwnTokens(self.input + prompt - cached, self.cached + cached, self.output + output)


def own_tokens(turns: Sequence[Turn]) -> OwnTokens:
    """Of a trajectory that was sampled here."""
    fresh, cached, output = 0, 0, 0
    held = np.zeros(0, np.int32)
    for turn in turns:
        prompt, sampled = turn.prompt_token_ids, turn.completion.token_ids
        num_cached = _common_prefix(held, prompt)
        fresh, cached, output = fresh + len(prompt) - num_cached, cached + num_cached, output + len(sampled)
        held = np.concatenate([prompt, sampled])
    return OwnTokens(fresh, cached, output)


def _common_prefix(x: np.ndarray, y: np.ndarray) -> int:
    """Elements that two arrays begin with alike."""
    size = min(len(x), len(y))
    differ = x[:size] != y[:size]
    return int(differ.argmax()) if differ.any() else size

"""Simulated experts: models with a declared skill, price and latency, the same for the same seed on any
machine.
"""

import hashlib
import json
from typing import Any

from tools_server.config import ExpertProfile


def unit_draw(*parts: Any) -> float:
    """A number in [0, 1) that depends on nothing but `parts` (JSON values)."""
    text = json.dumps(parts, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()[:7]) / 2**56


class SimulatedExpert:
    """One expert as one task meets it. `cost_usd` and `latency_s` are those of each of its calls."""

    __slots__ = ("_level", "_name", "_reliability", "cost_usd", "latency_s")

    def __init__(self, name: str, profile: ExpertProfile, domain: str, usd_per_million_tokens: float | None) -> None:
        """A price of None means the profile's own. Raises ValueError where it declares no skill for
        `domain`.
        """
        level = profile.skill.get(domain) or profile.skill.get("default")
        if level is None:
            raise ValueError(
                f"expert {name!r} declares no skill for domain {domain!r}; it has "
                f"{', '.join(profile.skill)}; add that domain or 'default' to its skill"
            )
        price = profile.usd_per_million_tokens if usd_per_million_tokens is None else usd_per_million_tokens
        self._name = name
        self._level = level
        self._reliability = profile.reliability
        self.cost_usd = profile.tokens_per_call * price / 1e6
        self.latency_s = profile.latency_s

    def succeeds(self, difficulty: int, seed: int, task: Any) -> bool:
        """Skill reaches `difficulty`, and chance, fixed by (`seed`, this expert, `task`), does not strike."""
        if self._level < difficulty:
            return False
        return self._reliability >= 1 or unit_draw(seed, self._name, task) < self._reliability

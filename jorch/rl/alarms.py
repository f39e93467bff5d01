"""What makes a run worth a look before it is over: one line on the terminal when it begins, none while it lasts."""

import statistics
from collections.abc import Mapping

from jorch.sections import WatchConfig

_LOG_RATIOS = ("policy/log_ratio_p01_nats", "policy/log_ratio_p99_nats")
_TOOL_CALLS = "rollout/tool_calls_per_turn"
_FIRST_STEPS = 5
"""So many steps say what is usual."""


class Alarms:
    """Fed with a run's metrics, step by step; a resumed run is first fed with what was written before."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._tool_calls: list[float] = []
        self._lasting: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """A line for each alarm that begins at this step."""
        reasons = {"log_ratio": self._log_ratio(metrics), "tool_calls": self._collapse(metrics.get(_TOOL_CALLS))}
        begun = [f"step {step}: {why}" for name, why in reasons.items() if why and name not in self._lasting]
        self._lasting = {name for name, why in reasons.items() if why}
        return begun

    def _log_ratio(self, metrics: Mapping[str, float | None]) -> str | None:
        limit = self._config.log_ratio_nats
        low, high = (metrics.get(name) or 0.0 for name in _LOG_RATIOS)
        if limit is None or max(-low, high) <= limit:
            return None
        return (
            f"log(trainer / sampler) is {low:.3g} at the 1st and {high:.3g} nats at the 99th percentile of the tokens, "
            f"watch.log_ratio_nats is {limit:g}: does the sampler compute the trainer's model, with its weights?"
        )

    def _collapse(self, rate: float | None) -> str | None:
        part = self._config.tool_call_fraction
        if part is None or rate is None:
            return None
        usual = statistics.median(self._tool_calls) if len(self._tool_calls) >= _FIRST_STEPS else 0.0
        self._tool_calls.append(rate)
        if rate >= part * usual:
            return None
        return (
            f"{rate:.3g} tool calls a turn, usual were {usual:.3g} (watch.tool_call_fraction is {part:g}): "
            "read trajectories.jsonl before the policy forgets its tools"
        )

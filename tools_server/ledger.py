"""The bill of one session: every call that a tool carried out, the ending one included."""

from tools_server.environment import Observation
from tools_server.errors import UNBILLED


class Ledger:
    """Sums over a session's calls: USD, seconds, and calls per billed tool name."""

    __slots__ = ("cost_usd", "latency_s", "tool_counts")

    def __init__(self) -> None:
        self.cost_usd = 0.0
        self.latency_s = 0.0
        self.tool_counts: dict[str, int] = {}

    def charge(self, observation: Observation) -> None:
        """Add one call. A failed tool (`tool_error`) is billed like any other; a message to the user has no
        tool.
        """
        if observation.error in UNBILLED:
            return
        self.cost_usd += observation.cost_usd
        self.latency_s += observation.latency_s
        if observation.tool:
            self.tool_counts[observation.tool] = self.tool_counts.get(observation.tool, 0) + 1

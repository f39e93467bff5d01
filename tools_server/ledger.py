"""The bill of one session: every call that a tool carried out, the ending one included."""

import math

from tools_server.environment import Observation
from tools_server.errors import UNBILLED
from tools_server.wire import CallResult


class Ledger:
    """Sums over a session's calls: USD, seconds, and calls per billed tool name.

    Sums are exactly rounded, so that they do not depend on the order in which parallel calls end.
    """

    __slots__ = ("_costs_usd", "_latencies_s", "tool_counts")

    def __init__(self) -> None:
        self._costs_usd: list[float] = []
        self._latencies_s: list[float] = []
        self.tool_counts: dict[str, int] = {}

    @property
    def cost_usd(self) -> float:
        return math.fsum(self._costs_usd)

    @property
    def latency_s(self) -> float:
        return math.fsum(self._latencies_s)

    def charge(self, call: Observation | CallResult) -> None:
        """Add one call. A failed tool (`tool_error`) is billed like any other; a message to the user has no
        tool.
        """
        if call.error in UNBILLED:
            return
        self._costs_usd.append(call.cost_usd)
        self._latencies_s.append(call.latency_s)
        if call.tool:
            self.tool_counts[call.tool] = self.tool_counts.get(call.tool, 0) + 1

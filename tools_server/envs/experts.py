"""The paper's QA tasks as an environment: three functions, each of which takes a role alias and nothing else.

`search` and `enhance_reasoning` gather evidence, `answer` ends the session. Which expert stands behind an
alias, and at what price, is part of the task (paper section 2: randomised per task), so the task carries
the tools' schemas too. The orchestrator writes neither queries nor answers; the verdict follows from the
experts' skills and the evidence.
"""

import math
from typing import Any, NamedTuple

from tools_server.config import ServerConfig
from tools_server.environment import Observation
from tools_server.tools.simulated import DEFAULT_DOMAIN, SimulatedExpert, draw_difficulty

SIMULATION_KEYS = ("domain", "difficulty", "needs")


class Function(NamedTuple):
    """What aliases a function takes, and what it answers."""

    prefix: str
    success: str
    failure: str


FUNCTIONS = {
    "search": Function("search-", "documents", "none"),
    "enhance_reasoning": Function("reasoner-", "output", "error"),
    "answer": Function("answer-", "answered", "answered"),
}
EVIDENCE = ("search", "enhance_reasoning")
PREFIXES = tuple(function.prefix for function in FUNCTIONS.values())


class ExpertsEnvironment:
    """One question.

    setup = {"model_mapping": {alias: expert name},
             "tool_pricing": {expert name: {"usd_per_million_tokens": x}},                      (optional)
             "simulation": {"domain": "math", "difficulty": 2, "needs": ["search"]}}            (optional)

    A simulated call succeeds iff the expert's skill in the domain reaches the difficulty (and its
    reliability holds). The answer is right iff it succeeds and every function in `needs` has succeeded
    before. Without "simulation" the domain is "general", the difficulty is drawn from 1..3 by a hash of
    (seed, setup), and nothing is needed.
    """

    blocking = False

    def __init__(self, setup: dict[str, Any], seed: int, config: ServerConfig) -> None:
        """Raises ValueError where `setup` names an unknown expert, prefix or key."""
        self.tools: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self._setup = setup
        self._seed = seed
        self._server_seed = config.seed
        domain, self._difficulty, self._needs = _read_simulation(setup, seed)
        self._experts = _read_experts(setup, domain, config)
        self._called: set[str] = set()
        self._evidence: set[str] = set()
        self._outcome = 0.0

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        """Ask the expert behind `arguments["model"]`; calling an alias again ends the session unsolved."""
        function = FUNCTIONS.get(name)
        if function is None:
            return Observation(name, f"unknown tool; allowed: {', '.join(FUNCTIONS)}", error="unknown_tool")
        alias: Any = arguments.get("model")
        expert = self._experts.get(alias) if isinstance(alias, str) else None
        if expert is None or len(arguments) != 1 or not alias.startswith(function.prefix):
            return Observation(name, self._explain(function, arguments), error="invalid_arguments")
        if alias in self._called:
            return Observation(alias, "repeated", error="repeated_call", ended=True)
        self._called.add(alias)
        success = expert.succeeds(self._difficulty, self._server_seed, (self._seed, self._setup))
        if name == "answer":
            self._outcome = float(success and self._needs <= self._evidence)
            return Observation(alias, function.success, expert.cost_usd, expert.latency_s, ended=True)
        if not success:
            return Observation(alias, function.failure, expert.cost_usd, expert.latency_s, "tool_error")
        self._evidence.add(name)
        return Observation(alias, function.success, expert.cost_usd, expert.latency_s)

    def outcome(self) -> float:
        """1 if answered rightly, else 0."""
        return self._outcome

    def _explain(self, function: Function, arguments: dict[str, Any]) -> str:
        extra = sorted(str(key) for key in arguments if key != "model")
        if extra:
            return f"$.{extra[0][:40]}: not an argument; allowed: model"
        allowed = ", ".join(alias for alias in self._experts if alias.startswith(function.prefix))
        return f"$.model: must be one of {allowed or '(none in this session)'}"


def _read_simulation(setup: dict[str, Any], seed: int) -> tuple[str, int, frozenset[str]]:
    """Domain, difficulty, needs."""
    simulation = setup.get("simulation", {})
    if not isinstance(simulation, dict) or not simulation.keys() <= set(SIMULATION_KEYS):
        raise ValueError(f"setup.simulation: got {simulation!r}, allowed keys: {', '.join(SIMULATION_KEYS)}")
    domain = simulation.get("domain", DEFAULT_DOMAIN)
    needs = simulation.get("needs", [])
    difficulty = simulation.get("difficulty")
    if difficulty is None:
        difficulty = draw_difficulty(seed, setup)
    if not isinstance(domain, str):
        raise ValueError(f"setup.simulation.domain: got {domain!r}, expected a string")
    if not isinstance(difficulty, int) or difficulty < 1:
        raise ValueError(f"setup.simulation.difficulty: got {difficulty!r}, expected an integer >= 1")
    if not isinstance(needs, list) or any(need not in EVIDENCE for need in needs):
        raise ValueError(f"setup.simulation.needs: got {needs!r}, expected a list of {', '.join(EVIDENCE)}")
    return domain, difficulty, frozenset(needs)


def _read_experts(setup: dict[str, Any], domain: str, config: ServerConfig) -> dict[str, SimulatedExpert]:
    """The expert behind each alias."""
    mapping, pricing = setup.get("model_mapping"), setup.get("tool_pricing", {})
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError("setup.model_mapping: expected {alias: expert name} with at least one entry")
    if not isinstance(pricing, dict):
        raise ValueError("setup.tool_pricing: expected {expert name: {usd_per_million_tokens: x}}")
    experts = {}
    for alias, name in mapping.items():
        if not alias.startswith(PREFIXES):
            prefixes = ", ".join(f"{prefix}*" for prefix in PREFIXES)
            raise ValueError(f"setup.model_mapping: alias {alias!r} has an unknown prefix; allowed: {prefixes}")
        profile = config.experts.get(name) if isinstance(name, str) else None
        if profile is None:
            raise ValueError(
                f"setup.model_mapping.{alias}: unknown expert {name!r}; add it to the server's `experts` "
                f"({len(config.experts)} declared; GET /v1/experts lists them)"
            )
        experts[alias] = SimulatedExpert(name, profile, domain, _read_price(pricing, name))
    return experts


def _read_price(pricing: dict[str, Any], name: str) -> float | None:
    if name not in pricing:
        return None
    entry = pricing[name]
    price = entry.get("usd_per_million_tokens") if isinstance(entry, dict) else None
    if not isinstance(price, int | float) or not 0 <= price < math.inf:
        raise ValueError(f"setup.tool_pricing.{name}: got {entry!r}, expected {{usd_per_million_tokens: x >= 0}}")
    return price

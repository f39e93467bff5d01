"""Simulated experts: models with a declared skill, price and latency, the same for the same seed on any machine.

One home for both of their uses: the role aliases of the miniature world (`envs/experts.py`) and the tool kind
*simulated*, an expert that a session of the environment `tools` asks like any other.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import Field, PositiveInt

from tools_server.config import ExpertProfile, Section, SimulatedConfig
from tools_server.tool import CallContext, Price, Tool, ToolOutput, ToolSpec, Usage, object_schema

DEFAULT_DOMAIN = "general"
MAX_DIFFICULTY = 3
"""Of tasks that state none."""
DESCRIPTION = "Asks the model {expert}, which sees nothing but the prompt, and returns its answer."


class Simulation(Section):
    """What simulated experts need to know of a session's task.

    Example: {"domain": "math", "difficulty": 2, "answer": "42", "mistakes": ["41", "43"]}
    """

    domain: str = DEFAULT_DOMAIN
    difficulty: PositiveInt | None = Field(None, description="None = drawn from 1 to 3 by the session's seed")
    answer: str = Field(description="what an expert says whose skill reaches the difficulty")
    mistakes: tuple[str, ...] = Field(("I do not know.",), min_length=1, description="one of which the others say")


def unit_draw(*parts: Any) -> float:
    """A number in [0, 1) that depends on nothing but `parts` (JSON values)."""
    text = json.dumps(parts, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()[:7]) / 2**56


def draw_difficulty(seed: int, task: Any) -> int:
    """The difficulty of a task that states none."""
    return 1 + int(MAX_DIFFICULTY * unit_draw("difficulty", seed, task))


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


class SimulatedTool:
    """An entry of the server's `experts` as a tool. It answers as the session's `simulation` says, whatever the prompt.

    Asked again, it answers the same: in one session an expert is right or wrong about the task.
    """

    def __init__(
        self, name: str, config: SimulatedConfig, profile: ExpertProfile, seed: int, time_scale: float
    ) -> None:
        """`seed` and `time_scale` are the server's."""
        prompt = {"type": "string", "description": "everything that the model is to know", "minLength": 1}
        self.spec = ToolSpec(
            name,
            config.description or DESCRIPTION.format(expert=config.expert),
            object_schema({"prompt": prompt}, ["prompt"]),
            timeout_s=config.timeout_s,
            version=config.version,
            price=Price(call_usd=config.usd_per_call, output_usd=profile.usd_per_million_tokens / 1e6),
            latency_s=profile.latency_s if config.latency_s is None else config.latency_s,
        )
        self._expert_name = config.expert
        self._profile = profile
        self._seed = seed
        self._time_scale = time_scale

    async def start(self) -> list["SimulatedTool"]:
        return [self]

    async def close(self) -> None:
        pass

    def expert(self, domain: str) -> SimulatedExpert:
        """Raises ValueError where the expert declares no skill for `domain`."""
        return SimulatedExpert(self._expert_name, self._profile, domain, None)

    async def call(self, arguments: dict[str, Any], context: CallContext) -> ToolOutput:
        simulation = context.simulation
        if not isinstance(simulation, Simulation):
            return ToolOutput("a simulated expert answers in sessions only that have setup.simulation", "tool_error")
        work_s = (self.spec.latency_s or 0.0) * self._time_scale
        await asyncio.sleep(work_s)
        task = (context.seed, simulation.model_dump(mode="json"))
        difficulty = simulation.difficulty or draw_difficulty(*task)
        answer = simulation.answer
        if not self.expert(simulation.domain).succeeds(difficulty, self._seed, task):
            chosen = unit_draw("mistake", self._seed, self._expert_name, task)
            answer = simulation.mistakes[int(chosen * len(simulation.mistakes))]
        return ToolOutput(answer, None, Usage(output_tokens=self._profile.tokens_per_call), work_s)


def check_simulation(simulation: Simulation | None, tools: Iterable[Tool]) -> None:
    """Raises ValueError where one of `tools` is simulated and `simulation` is not what it needs."""
    for tool in tools:
        if isinstance(tool, SimulatedTool):
            if simulation is None:
                raise ValueError(f"setup.simulation: {tool.spec.name!r} is simulated and has to know the task's answer")
            tool.expert(simulation.domain)

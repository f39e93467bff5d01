"""The miniature world: tasks small enough to learn on a laptop, with the structure of the paper's QA tasks.

Three functions (`search`, `enhance_reasoning`, `answer`) take a role alias. Which simulated expert stands behind an
alias, hence its skill, price and latency, and what the user prefers, differ per task and stand in the prompt, so a
policy has to read them (paper section 3, appendix; the prompt's table replaces the paper's tool descriptions). A call
succeeds iff the expert's skill reaches the question's difficulty; `answer` also needs the evidence that the question's
words ask for. One in five expert profiles is never shown in training; the held-out split uses only those.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jorch.sections import MiniatureConfig
from jorch.types import Task

FUNCTIONS = ("search", "enhance_reasoning", "answer")
_ROLE = {"search": "search", "enhance_reasoning": "reasoner", "answer": "answer"}
ALIASES = {function: tuple(f"{_ROLE[function]}-{i}" for i in (1, 2, 3)) for function in FUNCTIONS}
FUNCTION_OF = {alias: function for function, aliases in ALIASES.items() for alias in aliases}
TOKENS_PER_CALL = {"search": 1000, "enhance_reasoning": 1000, "answer": 2000}

_PRICES = {1: (1, 2), 2: (2, 3), 3: (4, 5)}
"""Range of the price in USD per million tokens, by skill: the strongest costs about twice the next."""
_LATENCIES_S = range(1, 6)
_SKILL_WEIGHTS = (0.3, 0.35, 0.35)
_HELDOUT_SHARE = 0.2
MAX_COST_USD, MAX_LATENCY_S = 0.020, 15.0
"""The dearest and slowest sensible trajectory: three calls of the dearest and slowest experts."""

_DOMAINS = ("general", "math")
_QUESTIONS = {
    (): ("Explain why {} is famous.", "Write a note on {}."),
    ("search",): ("Who founded {}?", "When did {} open?"),
    ("enhance_reasoning",): ("Simulate the queue of {}.", "Sort the list of {}."),
    ("search", "enhance_reasoning"): ("Total the yearly sales of {}.", "Fit the published data of {}."),
}
NEEDS_WEIGHTS = (0.2, 0.3, 0.3, 0.2)
_DIFFICULTY_WEIGHTS = (0.5, 0.35, 0.15)
PREFERENCES = ("cheap", "fast", "avoid", "prefer", "none")
_PREFERENCE_WEIGHTS = (0.3, 0.25, 0.15, 0.15, 0.15)
_COST_LATENCY = {"cheap": (0.6, 0.1), "fast": (0.1, 0.6)}
_DEFAULT_COST_LATENCY = (0.3, 0.1)
_SUBJECT_WEIGHT = 0.5
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]

Expert = dict[str, Any]
"""{"function", "skill", "usd_per_million_tokens", "cost_usd", "latency_s"}"""


def expert_name(expert: Expert) -> str:
    """The name under which the tool server's catalogue knows a profile."""
    return (
        f"sim-{_ROLE[expert['function']]}-s{expert['skill']}"
        f"-p{expert['usd_per_million_tokens']:g}-t{expert['latency_s']:g}"
    )


def profiles(function: str) -> list[Expert]:
    """Every profile that may stand behind an alias of `function`."""
    tokens = TOKENS_PER_CALL[function]
    return [
        {
            "function": function,
            "skill": skill,
            "usd_per_million_tokens": float(price),
            "cost_usd": price * tokens / 1e6,
            "latency_s": float(latency_s),
        }
        for skill, (low, high) in _PRICES.items()
        for price in range(low, high + 1)
        for latency_s in _LATENCIES_S
    ]


def _heldout_names() -> set[str]:
    """A fifth of the profiles of every function and skill: those whose names hash lowest."""
    names: set[str] = set()
    for function in FUNCTIONS:
        for skill in _PRICES:
            stratum = [expert_name(e) for e in profiles(function) if e["skill"] == skill]
            stratum.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
            names.update(stratum[: round(_HELDOUT_SHARE * len(stratum))])
    return names


_HELDOUT = _heldout_names()


def is_heldout(expert: Expert) -> bool:
    """Whether a profile is kept from training."""
    return expert_name(expert) in _HELDOUT


def catalogue() -> dict[str, dict[str, Any]]:
    """Every profile as an entry of the tool server's `experts` section."""
    return {
        expert_name(expert): {
            "kind": "simulated",
            "skill": {"default": expert["skill"]},
            "usd_per_million_tokens": expert["usd_per_million_tokens"],
            "tokens_per_call": TOKENS_PER_CALL[function],
            "latency_s": expert["latency_s"],
        }
        for function in FUNCTIONS
        for expert in profiles(function)
    }


_POOLS = {
    (function, heldout, skill): [e for e in profiles(function) if is_heldout(e) == heldout and e["skill"] == skill]
    for function in FUNCTIONS
    for heldout in (False, True)
    for skill in (1, 2, 3)
}


def _draw_expert(rng: random.Random, function: str, heldout: bool) -> Expert:
    [skill] = rng.choices((1, 2, 3), _SKILL_WEIGHTS)
    return rng.choice(_POOLS[function, heldout, skill])


def _draw_experts(
    rng: random.Random, heldout: bool, difficulty: int, num_answers: int
) -> tuple[dict[str, Expert], dict[str, list[str]]]:
    """Experts for all aliases such that every function has a capable one, `answer` at least `num_answers`."""
    while True:
        experts = {a: _draw_expert(rng, f, heldout) for f, aliases in ALIASES.items() for a in aliases}
        capable = {f: [a for a in ALIASES[f] if experts[a]["skill"] >= difficulty] for f in FUNCTIONS}
        if all(capable.values()) and len(capable["answer"]) >= num_answers:
            return experts, capable


def _prompt(question: str, last_line: str, experts: dict[str, Expert]) -> str:
    def cells(alias: str) -> str:
        e = experts[alias]
        return f" {alias}=skill{e['skill']} {alias}=${e['usd_per_million_tokens']:g} {alias}={e['latency_s']:g}s"

    table = "".join("\n" + "".join(map(cells, aliases)) for aliases in ALIASES.values())
    return f"Tools:{table}\n{question}\n{last_line}"


_DESCRIPTIONS = {
    "search": "Let an expert write a query and return the documents found.",
    "enhance_reasoning": "Let an expert write code, run it and return the output.",
    "answer": "Let an expert give the final answer. Ends the task.",
}
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": function,
            "description": _DESCRIPTIONS[function],
            "parameters": {
                "type": "object",
                "properties": {"model": {"type": "string", "enum": list(ALIASES[function])}},
                "required": ["model"],
                "additionalProperties": False,
            },
        },
    }
    for function in FUNCTIONS
)


def make_task(
    rng: random.Random,
    heldout: bool,
    task_id: str,
    split: str,
    *,
    kind: str | None = None,
    rule: str | None = None,
    needs_weights: tuple[float, ...] = NEEDS_WEIGHTS,
) -> Task:
    """Draw a task.

    Args:
        kind: the preference, one of PREFERENCES; drawn when None.
        rule: replaces the preference line by a rule line (for the base's demonstrations): a preference, or
            "strongest".
        needs_weights: of needing nothing, a search, reasoning, or both before the answer.
    """
    [needs] = rng.choices(list(_QUESTIONS), needs_weights)
    domain = rng.choice(_DOMAINS)
    [difficulty] = rng.choices((1, 2, 3), _DIFFICULTY_WEIGHTS)
    kind = rule or kind or rng.choices(PREFERENCES, _PREFERENCE_WEIGHTS)[0]
    about_one = kind in ("avoid", "prefer")
    experts, capable = _draw_experts(rng, heldout, difficulty, num_answers=2 if about_one else 1)
    subject = rng.choice(capable["answer"]) if about_one else None
    name = rng.choice(_SYLLABLES).capitalize() + rng.choice(_SYLLABLES)
    question = f"{rng.choice(_QUESTIONS[needs]).format(name)} {domain} level-{difficulty}"
    last_line = f"{'Rule' if rule else 'Preference'}: {kind}" + (f" {subject}" if subject else "")
    w_cost, w_latency = _COST_LATENCY.get(kind, _DEFAULT_COST_LATENCY)
    preference = {"outcome": 1.0, "cost": w_cost, "latency": w_latency}
    if subject:
        preference[subject] = _SUBJECT_WEIGHT if kind == "prefer" else -_SUBJECT_WEIGHT
    return Task(
        task_id=task_id,
        messages=({"role": "user", "content": _prompt(question, last_line, experts)},),
        tools=TOOLS,
        environment="experts",
        setup={
            "model_mapping": {alias: expert_name(expert) for alias, expert in experts.items()},
            "simulation": {"domain": domain, "difficulty": difficulty, "needs": list(needs)},
        },
        preference=preference,
        answer=None,
        domain=domain,
        split=split,
        truth={
            "kind": kind,
            "subject": subject,
            "needs": list(needs),
            "capable": capable,
            "experts": experts,
            "max_cost_usd": MAX_COST_USD,
            "max_latency_s": MAX_LATENCY_S,
        },
    )


def tasks(config: MiniatureConfig, split: str, seed: int) -> Iterator[Task]:
    """The tasks of a split, each from a seed of its own, so that splits never depend on each other's sizes."""
    count = {
        "train": config.num_train,
        "validation": config.num_validation,
        "heldout": config.num_heldout,
    }[split]
    for index in range(count):
        task_id = f"{split}-{index:06d}"
        yield make_task(random.Random(f"{seed}/{task_id}"), split == "heldout", task_id, split)


# The base's demonstrations: it learns to read the table by obeying rules, and to ignore preferences.

_RULES = ("cheap", "fast", "strongest", "avoid", "prefer")
_RULE_WEIGHTS = (0.3, 0.3, 0.15, 0.125, 0.125)
_DEMO_NEEDS_WEIGHTS = (0.1, 0.2, 0.2, 0.5)
_STRONGEST_SHARE = 0.75
_FAILED_EVIDENCE_SHARE = 0.1


def choices(task: Task, function: str, kind: str) -> list[str]:
    """The capable aliases of `function` that obey `kind` best: a preference, "strongest" or "random"."""
    experts, capable, subject = task.truth["experts"], task.truth["capable"][function], task.truth["subject"]
    keys = {
        "cheap": lambda a: experts[a]["usd_per_million_tokens"],
        "fast": lambda a: experts[a]["latency_s"],
        "random": lambda a: 0,
    }
    key = keys.get(kind, lambda a: -experts[a]["skill"])
    if function == "answer" and kind == "prefer":
        return [subject]
    if function == "answer" and kind == "avoid":
        capable = [a for a in capable if a != subject]
    best = min(map(key, capable))
    return [a for a in capable if key(a) == best]


def call_text(alias: str) -> str:
    """An assistant message that calls `alias`."""
    call = {"name": FUNCTION_OF[alias], "arguments": {"model": alias}}
    return f"<tool_call>{json.dumps(call, separators=(',', ':'))}</tool_call>"


def observation(task: Task, alias: str) -> str:
    """What a (fully reliable) simulated expert says, as the tool server's `experts` environment defines it."""
    succeeded = alias in task.truth["capable"][FUNCTION_OF[alias]]
    words = {"search": ("none", "documents"), "enhance_reasoning": ("error", "output")}
    return words[FUNCTION_OF[alias]][succeeded]


def demonstration(rng: random.Random, rule_fraction: float) -> list[dict[str, str]]:
    """One demonstration as chat messages.

    With probability `rule_fraction` the prompt's last line is a rule and the calls obey it. Otherwise it is a
    preference and the calls ignore it: mostly the strongest capable expert, sometimes a random capable one, and
    now and then an incapable one first whose failure is repaired. So the base reads the table, recovers from
    failures, and defaults to strength as the untrained models of the paper's figure 3 do.
    """
    rule = rng.choices(_RULES, _RULE_WEIGHTS)[0] if rng.random() < rule_fraction else None
    task = make_task(rng, False, "demo", "train", rule=rule, needs_weights=_DEMO_NEEDS_WEIGHTS)
    kind = rule or ("strongest" if rng.random() < _STRONGEST_SHARE else "random")
    messages = [dict(task.messages[0])]
    for function in (*task.truth["needs"], "answer"):
        alias = rng.choice(choices(task, function, kind))
        incapable = [a for a in ALIASES[function] if a not in task.truth["capable"][function]]
        if not rule and function != "answer" and incapable and rng.random() < _FAILED_EVIDENCE_SHARE:
            failed, alias = rng.choice(incapable), rng.choice(choices(task, function, "strongest"))
            messages += [_assistant(failed), _tool(observation(task, failed))]
        messages.append(_assistant(alias))
        if function != "answer":
            messages.append(_tool(observation(task, alias)))
    return messages


def _assistant(alias: str) -> dict[str, str]:
    return {"role": "assistant", "content": call_text(alias)}


def _tool(content: str) -> dict[str, str]:
    return {"role": "tool", "content": content}


def symbols() -> list[str]:
    """Strings that the miniature's tokenizer keeps whole: table cells, calls, words of questions."""
    call_heads = [f'<tool_call>{{"name":"{f}","arguments":{{"model":"' for f in FUNCTIONS]
    cells = [
        f" {alias}={value}"
        for alias in FUNCTION_OF
        for value in (
            *(f"skill{s}" for s in _PRICES),
            *(f"${p}" for p in range(1, 6)),
            *(f"{t}s" for t in _LATENCIES_S),
        )
    ]
    words = {w for qs in _QUESTIONS.values() for q in qs for w in re.findall(r" ?[A-Za-z]+|[.?]", q)}
    words |= {f" {w}" for w in (*PREFERENCES, "strongest", *_DOMAINS)}
    words |= {" " + s.capitalize() for s in _SYLLABLES} | set(_SYLLABLES)
    words |= {f" level-{d}" for d in (1, 2, 3)} | {f" {a}" for a in ALIASES["answer"]}
    names = [
        *FUNCTION_OF,
        *FUNCTIONS,
        "documents",
        "none",
        "output",
        "error",
        "Rule:",
        "Preference:",
        "Tools:",
    ]
    return [*call_heads, '"}}</tool_call>', *names, *cells, *sorted(words)]


def write_jsonl(path: Path, split_tasks: Iterator[Task]) -> int:
    """Write tasks in the format of `data/tasks.py`; returns how many."""
    from jorch.data.tasks import to_row

    count = 0
    with path.open("w", encoding="utf-8") as file:
        for task in split_tasks:
            file.write(json.dumps(to_row(task), separators=(",", ":")) + "\n")
            count += 1
    return count

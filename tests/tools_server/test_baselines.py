"""Agents that do not try, on tasks for simulated experts; on tau2's domains: test_conformance."""

import asyncio
import json

import pytest

from tools_server.baselines import POLICIES, main, play_experts, read_setups
from tools_server.config import ServerConfig

EXPERTS = {
    name: {
        "kind": "simulated",
        "skill": {"default": skill},
        "usd_per_million_tokens": 1.0,
        "tokens_per_call": 1000,
        "latency_s": 1.0,
    }
    for name, skill in (("weak", 1), ("strong", 3))
}


def row(first_answer, needs, difficulty=2):
    other = {"weak": "strong", "strong": "weak"}[first_answer]
    mapping = {"search-1": "weak", "search-2": "strong", "answer-1": first_answer, "answer-2": other}
    return {"model_mapping": mapping, "simulation": {"domain": "x", "difficulty": difficulty, "needs": needs}}


ROWS = [row("strong", ["search"]), row("weak", ["search"]), row("strong", ["enhance_reasoning"]), row("weak", [], 1)]


def test_what_each_scores(tmp_path, capsys):
    tasks, config = tmp_path / "tasks.jsonl", tmp_path / "server.yaml"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config.write_text(json.dumps({"experts": EXPERTS}))  # JSON is YAML
    scores = {
        policy: asyncio.run(play_experts(read_setups(tasks), policy, ServerConfig.model_validate({"experts": EXPERTS})))
        for policy in POLICIES
    }
    assert scores == {"no-op": [0.0] * 4, "refuse": [0.0] * 4, "spam": [1.0, 0.0, 0.0, 1.0]}
    assert main(["--tasks", str(tasks), "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "| tasks.jsonl |  | 0/4 | 0/4 | 2/4 |  |  |"


def test_rows_that_are_no_tasks_are_named(tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps(ROWS[0]) + "\n{}\n")
    with pytest.raises(
        ValueError, match=r"tasks\.jsonl:2: no task for simulated experts \(KeyError: 'model_mapping'\)"
    ):
        read_setups(tmp_path / "tasks.jsonl")
    with pytest.raises(ValueError, match="pass --tasks and --config together"):
        main(["--tasks", str(tmp_path / "tasks.jsonl")])

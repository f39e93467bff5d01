"""The miniature world keeps its promises: honest splits, solvable tasks, demonstrations that do what they say."""

import json
import random
from collections import Counter

import pytest

from jorch.data.chat import parse_calls, render_prompt
from jorch.data.tasks import read_jsonl
from jorch.evals.baselines import POLICIES, choose
from jorch.rollout.outcomes import row_from
from jorch.sections import MiniatureConfig
from jorch.synth import miniature
from jorch.synth.miniature import ALIASES, FUNCTION_OF, FUNCTIONS
from jorch.synth.sft import train_tokenizer
from tools_server.config import ServerConfig
from tools_server.envs.experts import ExpertsEnvironment

CONFIG = MiniatureConfig(num_train=400, num_validation=100, num_heldout=400)
SPLITS = {split: list(miniature.tasks(CONFIG, split, seed=0)) for split in ("train", "validation", "heldout")}
TASKS = [task for tasks in SPLITS.values() for task in tasks]
SERVER = ServerConfig(experts=miniature.catalogue())


def profiles(split):
    return {name for task in SPLITS[split] for name in task.setup["model_mapping"].values()}


def test_held_out_experts_are_never_seen_in_training():
    assert profiles("heldout").isdisjoint(profiles("train") | profiles("validation"))
    everything = {miniature.expert_name(e) for f in FUNCTIONS for e in miniature.profiles(f)}
    heldout = {miniature.expert_name(e) for f in FUNCTIONS for e in miniature.profiles(f) if miniature.is_heldout(e)}
    assert profiles("heldout") == heldout
    assert profiles("train") == everything - heldout
    assert len(heldout) / len(everything) == pytest.approx(0.2, abs=0.02)
    for function in FUNCTIONS:
        for skill in (1, 2, 3):
            held = [e for e in miniature.profiles(function) if e["skill"] == skill and miniature.is_heldout(e)]
            assert held, f"no held-out {function} of skill {skill}"


def test_splits_do_not_depend_on_each_others_sizes():
    more = MiniatureConfig(num_train=3, num_validation=200, num_heldout=401)
    assert list(miniature.tasks(more, "validation", 0))[:100] == SPLITS["validation"]
    assert list(miniature.tasks(more, "heldout", 0))[:400] == SPLITS["heldout"]
    assert list(miniature.tasks(CONFIG, "train", 1)) != SPLITS["train"]
    assert len({task.task_id for task in TASKS}) == len(TASKS)


def play(task, aliases):
    """(outcome, cost, latency) by the tool server's own environment."""
    session = ExpertsEnvironment(task.setup, 0, SERVER)
    seen = [session.call(FUNCTION_OF[alias], {"model": alias}) for alias in aliases]
    return session.outcome(), sum(o.cost_usd for o in seen), sum(o.latency_s for o in seen)


def test_every_task_is_solvable_by_exactly_the_experts_called_capable():
    for task in TASKS:
        for function, capable in task.truth["capable"].items():
            assert capable, (task.task_id, function)
            for alias in ALIASES[function]:
                session = ExpertsEnvironment(task.setup, 0, SERVER)
                observed = session.call(function, {"model": alias})
                expert = task.truth["experts"][alias]
                assert (observed.cost_usd, observed.latency_s) == pytest.approx(
                    (expert["cost_usd"], expert["latency_s"])
                )
                if function != "answer":
                    assert (observed.error is None) == (alias in capable)
                    assert observed.content == miniature.observation(task, alias)
        plan = [task.truth["capable"][function][0] for function in (*task.truth["needs"], "answer")]
        assert play(task, plan)[0] == 1.0
        incapable = set(ALIASES["answer"]) - set(task.truth["capable"]["answer"])
        assert all(play(task, [*plan[:-1], alias])[0] == 0.0 for alias in incapable)
        assert all(play(task, [a for a in plan if a != evidence])[0] == 0.0 for evidence in plan[:-1])


def test_utility_stays_within_its_scale_and_the_oracles_is_highest():
    for task in TASKS[::5]:
        utilities = {}
        for policy in POLICIES:
            rng = random.Random(0)
            plan = [choose(policy, task, function, rng) for function in (*task.truth["needs"], "answer")]
            outcome, cost_usd, latency_s = play(task, plan)
            assert cost_usd <= task.truth["max_cost_usd"] + 1e-12
            assert latency_s <= task.truth["max_latency_s"]
            utilities[policy] = row_from(task, outcome, cost_usd, latency_s, Counter(plan), True, "answered").utility
        assert utilities["oracle"] >= max(utilities.values()) - 1e-12


def test_preferences_are_what_the_prompt_says():
    kinds = Counter(task.truth["kind"] for task in TASKS)
    assert kinds.keys() == set(miniature.PREFERENCES)
    for task in TASKS:
        kind, subject = task.truth["kind"], task.truth["subject"]
        last_line = task.messages[0]["content"].splitlines()[-1]
        assert last_line == f"Preference: {kind}" + (f" {subject}" if subject else "")
        assert (subject is not None) == (kind in ("avoid", "prefer"))
        if subject:
            assert subject in task.truth["capable"]["answer"]
            assert len(task.truth["capable"]["answer"]) >= 2, "the wish can be granted and refused"
            assert task.preference[subject] == (0.5 if kind == "prefer" else -0.5)
        assert (task.preference["cost"], task.preference["latency"]) == {"cheap": (0.6, 0.1), "fast": (0.1, 0.6)}.get(
            kind, (0.3, 0.1)
        )


def test_the_prompts_table_is_the_truth():
    for task in TASKS:
        table = task.messages[0]["content"].splitlines()[1:4]
        for line, aliases in zip(table, ALIASES.values(), strict=True):
            cells = line.split()
            for alias in aliases:
                e = task.truth["experts"][alias]
                expected = [f"skill{e['skill']}", f"${e['usd_per_million_tokens']:g}", f"{e['latency_s']:g}s"]
                assert [cell.split("=")[1] for cell in cells if cell.startswith(alias)] == expected


def test_prompts_and_calls_are_short():
    """Cells and calls are single tokens, else reading the table is out of reach of a model this small."""
    tokenizer = train_tokenizer()
    lengths = [len(tokenizer.encode(render_prompt(task.messages, task.tools, "compact"))) for task in TASKS]
    assert max(lengths) <= 64
    assert 45 <= sum(lengths) / len(lengths) <= 56
    for alias in FUNCTION_OF:
        assert len(tokenizer.encode(miniature.call_text(alias) + "<|im_end|>")) == 4
    for symbol in miniature.symbols():
        assert len(tokenizer.encode(symbol)) == 1, symbol


def read_demonstration(messages):
    """(kind of the last line, "Rule" or "Preference", subject, experts by alias, aliases called, observations)"""
    lines = messages[0]["content"].splitlines()
    head, _, rest = lines[-1].partition(": ")
    kind, *subject = rest.split()
    experts = {}
    for cell in " ".join(lines[1:4]).split():
        alias, value = cell.split("=")
        experts.setdefault(alias, []).append(int(value.strip("skil$")))
    called = [parse_calls(m["content"]).calls[0] for m in messages if m["role"] == "assistant"]
    assert all(FUNCTION_OF[call.arguments["model"]] == call.name for call in called)
    observed = [m["content"] for m in messages if m["role"] == "tool"]
    difficulty = int(lines[4][-1])
    return head, kind, subject, difficulty, experts, [call.arguments["model"] for call in called], observed


DEMONSTRATIONS = [miniature.demonstration(random.Random(i), 0.65) for i in range(1500)]


def test_demonstrations_with_a_rule_obey_it():
    ruled = 0
    for messages in DEMONSTRATIONS:
        head, kind, subject, difficulty, experts, called, observed = read_demonstration(messages)
        if head != "Rule":
            continue
        ruled += 1
        assert "none" not in observed
        assert "error" not in observed
        for alias in called:
            function = FUNCTION_OF[alias]
            capable = [a for a in ALIASES[function] if experts[a][0] >= difficulty]
            assert alias in capable
            skill, price, latency = experts[alias]
            if kind == "cheap":
                assert price == min(experts[a][1] for a in capable)
            elif kind == "fast":
                assert latency == min(experts[a][2] for a in capable)
            elif kind == "strongest" or function != "answer":
                assert skill == max(experts[a][0] for a in capable)
            elif kind == "prefer":
                assert [alias] == subject
            else:
                assert (kind, alias in subject) == ("avoid", False)
    assert ruled / len(DEMONSTRATIONS) == pytest.approx(0.65, abs=0.05)


def test_demonstrations_with_a_preference_ignore_it():
    """They prefer the strongest, whatever the user wishes, and recover from evidence that failed."""
    strongest, wishes, failures = [], Counter(), 0
    for messages in DEMONSTRATIONS:
        head, kind, subject, difficulty, experts, called, observed = read_demonstration(messages)
        if head == "Rule":
            continue
        assert messages[-1]["role"] == "assistant"
        assert called[-1].startswith("answer")
        failed = sum(content in ("none", "error") for content in observed)
        failures += failed > 0
        for alias, content in zip(called, observed, strict=False):
            assert (content in ("documents", "output")) == (experts[alias][0] >= difficulty)
        assert len(observed) == len(set(map(FUNCTION_OF.get, called))) - 1 + failed, "each failure is repaired"
        strongest.append(experts[called[-1]][0] == max(experts[a][0] for a in ALIASES["answer"]))
        if kind in ("avoid", "prefer"):
            wishes[kind, called[-1] in subject] += 1
    assert sum(strongest) / len(strongest) > 0.75
    assert failures > 20
    for kind in ("avoid", "prefer"):  # a wish moves nothing: avoided and preferred experts are used alike
        used = wishes[kind, True] / (wishes[kind, True] + wishes[kind, False])
        assert 0.2 < used < 0.8


def test_a_task_travels_as_json(tmp_path):
    """Written and read again it is the task that it was, but for tuples, which JSON has none of."""
    path = tmp_path / "tasks.jsonl"
    assert miniature.write_jsonl(path, iter(TASKS[:20])) == 20
    for task, read in zip(TASKS[:20], read_jsonl(path), strict=True):
        for part in ("setup", "tools", "truth", "preference"):
            assert json.dumps(getattr(read, part)) == json.dumps(getattr(task, part))

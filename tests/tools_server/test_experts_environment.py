import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools_server.config import ServerConfig
from tools_server.environment import Observation
from tools_server.envs.experts import ExpertsEnvironment
from tools_server.tools.simulated import unit_draw


def profile(skill, price=2.0, **others):
    shared = {"kind": "simulated", "tokens_per_call": 1500, "latency_s": 2.5}
    return shared | {"skill": skill, "usd_per_million_tokens": price} | others


CONFIG = ServerConfig.model_validate(
    {
        "experts": {
            "weak": profile({"default": 1}),
            "strong": profile({"default": 3}, price=4.0),
            "mathematician": profile({"math": 3}),
            "flaky": profile({"default": 3}, reliability=0.5),
        }
    }
)
MAPPING = {
    "search-1": "weak",
    "search-2": "strong",
    "reasoner-1": "weak",
    "reasoner-2": "strong",
    "answer-1": "weak",
    "answer-2": "strong",
}


def session(difficulty=2, needs=(), mapping=MAPPING, seed=0, domain="general", **others):
    simulation = {"domain": domain, "difficulty": difficulty, "needs": list(needs)}
    return ExpertsEnvironment({"model_mapping": mapping, "simulation": simulation, **others}, seed, CONFIG)


def ask(environment, function, alias):
    return environment.call(function, {"model": alias})


def test_every_function_answers_success_and_failure_and_bills_both():
    environment = session(difficulty=2)
    cheap, dear = (0.003, 2.5), (0.006, 2.5)
    assert ask(environment, "search", "search-2") == Observation("search-2", "documents", *dear)
    assert ask(environment, "search", "search-1") == Observation("search-1", "none", *cheap, "tool_error")
    assert ask(environment, "enhance_reasoning", "reasoner-2") == Observation("reasoner-2", "output", *dear)
    failed = ask(environment, "enhance_reasoning", "reasoner-1")
    assert failed == Observation("reasoner-1", "error", *cheap, "tool_error")
    answered = ask(environment, "answer", "answer-2")
    assert answered == Observation("answer-2", "answered", *dear, None, ended=True)
    assert environment.outcome() == 1.0


@given(
    difficulty=st.integers(1, 4),
    needs=st.sets(st.sampled_from(["search", "enhance_reasoning"])),
    aliases=st.lists(st.sampled_from(["search-1", "search-2", "reasoner-1", "reasoner-2"]), unique=True),
    answer=st.sampled_from(["answer-1", "answer-2"]),
)
def test_an_answer_is_right_iff_it_succeeds_and_its_evidence_was_found(difficulty, needs, aliases, answer):
    skill = {"weak": 1, "strong": 3}
    function = {"search": "search", "reasoner": "enhance_reasoning"}
    environment = session(difficulty, needs)
    evidence = set()
    for alias in aliases:
        name = function[alias.split("-")[0]]
        ask(environment, name, alias)
        if skill[MAPPING[alias]] >= difficulty:
            evidence.add(name)
    ask(environment, "answer", answer)
    expected = skill[MAPPING[answer]] >= difficulty and needs <= evidence
    assert environment.outcome() == float(expected)


def test_a_wrong_answer_reads_like_a_right_one():
    right, wrong = session(difficulty=1), session(difficulty=2)
    assert ask(right, "answer", "answer-1") == ask(wrong, "answer", "answer-1")
    assert (right.outcome(), wrong.outcome()) == (1.0, 0.0)


def test_a_repeated_alias_ends_the_session_unsolved_and_unbilled():
    environment = session(difficulty=1)
    ask(environment, "search", "search-1")
    repeated = ask(environment, "search", "search-1")
    assert repeated == Observation("search-1", "repeated", 0.0, 0.0, "repeated_call", ended=True)
    assert environment.outcome() == 0.0


@pytest.mark.parametrize(
    ("name", "arguments", "error", "content"),
    [
        ("serch", {"model": "search-1"}, "unknown_tool", "search, enhance_reasoning, answer"),
        ("", {"content": "hello"}, "unknown_tool", "search, enhance_reasoning, answer"),
        ("search", {"model": "search-9"}, "invalid_arguments", "$.model: must be one of search-1, search-2"),
        ("search", {"model": "answer-1"}, "invalid_arguments", "$.model: must be one of search-1, search-2"),
        ("search", {"model": ["search-1"]}, "invalid_arguments", "$.model: must be one of"),
        ("search", {}, "invalid_arguments", "$.model: must be one of"),
        ("search", {"model": "search-1", "query": "x"}, "invalid_arguments", "$.query: not an argument"),
    ],
)
def test_a_malformed_call_is_an_observation_that_costs_nothing(name, arguments, error, content):
    environment = session(difficulty=1)
    observation = environment.call(name, arguments)
    assert observation.error == error
    assert content in observation.content
    assert (observation.cost_usd, observation.latency_s, observation.ended) == (0.0, 0.0, False)
    assert ask(environment, "search", "search-1").error is None  # a refused call uses no alias up


def test_the_task_overrides_prices():
    environment = session(tool_pricing={"weak": {"usd_per_million_tokens": 10.0}})
    assert ask(environment, "search", "search-1").cost_usd == pytest.approx(0.015)
    assert ask(environment, "search", "search-2").cost_usd == pytest.approx(0.006)


def test_skill_is_looked_up_by_domain():
    environment = session(difficulty=3, domain="math", mapping={"answer-1": "mathematician"})
    ask(environment, "answer", "answer-1")
    assert environment.outcome() == 1.0
    with pytest.raises(ValueError, match="'mathematician' declares no skill for domain 'general'"):
        session(mapping={"answer-1": "mathematician"})


def flaky_outcome(seed, task):
    environment = session(1, mapping={"answer-1": "flaky"}, seed=seed, task=task)
    ask(environment, "answer", "answer-1")
    return environment.outcome()


def test_reliability_is_a_share_of_tasks_fixed_by_the_seed():
    outcomes = [flaky_outcome(0, task) for task in range(1000)]
    assert outcomes == [flaky_outcome(0, task) for task in range(1000)]
    assert outcomes != [flaky_outcome(1, task) for task in range(1000)]
    assert sum(outcomes) == pytest.approx(500, abs=5 * 1000**0.5 / 2)  # five standard deviations


def test_a_task_without_simulation_draws_its_difficulty_from_its_setup():
    def outcome(seed, task, expert):
        setup = {"model_mapping": {"answer-1": expert}, "task": task}
        environment = ExpertsEnvironment(setup, seed, CONFIG)
        ask(environment, "answer", "answer-1")
        return environment.outcome()

    weak = [outcome(0, task, "weak") for task in range(600)]
    assert weak == [outcome(0, task, "weak") for task in range(600)]
    assert sum(weak) == pytest.approx(200, abs=60)  # difficulty 1 of 1..3; five standard deviations
    assert all(outcome(0, task, "strong") == 1.0 for task in range(50))


def test_draws_do_not_depend_on_the_process():
    assert unit_draw("difficulty", 0, {"b": 1, "a": 2}) == unit_draw("difficulty", 0, {"a": 2, "b": 1})
    assert unit_draw(1, "x") == pytest.approx(0.5312840867872417, abs=1e-15)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({}, "setup.model_mapping: expected"),
        ({"model_mapping": {"answer-1": "absent"}}, "setup.model_mapping.answer-1: unknown expert 'absent'"),
        ({"model_mapping": {"judge-1": "weak"}}, "alias 'judge-1' has an unknown prefix; allowed: search-"),
        (
            {"model_mapping": MAPPING, "simulation": {"dificulty": 1}},
            "allowed keys: domain, difficulty, needs",
        ),
        ({"model_mapping": MAPPING, "simulation": {"difficulty": 0}}, "simulation.difficulty: got 0"),
        ({"model_mapping": MAPPING, "simulation": {"needs": ["answer"]}}, "simulation.needs: got"),
        ({"model_mapping": MAPPING, "simulation": {"domain": 3}}, "simulation.domain: got 3"),
        ({"model_mapping": MAPPING, "tool_pricing": {"weak": 3}}, "setup.tool_pricing.weak: got 3"),
        ({"model_mapping": MAPPING, "tool_pricing": []}, "setup.tool_pricing: expected"),
    ],
)
def test_a_bad_setup_is_refused_with_one_line(setup, message):
    with pytest.raises(ValueError) as caught:
        ExpertsEnvironment(setup, 0, CONFIG)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

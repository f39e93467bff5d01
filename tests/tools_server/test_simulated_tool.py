"""Simulated experts as tools of a session, over real HTTP."""

import asyncio

import pytest
from server_client import run, serving

from tools_server.config import ServerConfig
from tools_server.rescore import rescore
from tools_server.tools.simulated import SimulatedExpert

STRONG = {
    "kind": "simulated",
    "skill": {"default": 3},
    "usd_per_million_tokens": 10.0,
    "tokens_per_call": 2000,
    "latency_s": 30.0,
}
WEAK = STRONG | {"skill": {"default": 1, "math": 2}, "usd_per_million_tokens": 0.5, "latency_s": 5.0}
FICKLE = STRONG | {"reliability": 0.5}
EXPERTS = {"strong": STRONG, "weak": WEAK, "fickle": FICKLE}
TOOLS = {f"ask_{name}": {"kind": "simulated", "expert": name} for name in EXPERTS}
HARD = {"difficulty": 3, "answer": "Santiago", "mistakes": ["Lima", "Quito"]}
VERIFIER = {"kind": "exact", "answers": ["Santiago"]}


def test_skill_decides_and_the_profile_is_billed():
    async def scenario(server):
        await server.open(question="Capital of Chile?", simulation=HARD, verifier=VERIFIER)
        strong = await server.call("0", "ask_strong", prompt="Capital of Chile?")
        weak = await server.call("1", "ask_weak", prompt="Capital of Chile?")
        assert strong["content"] == "Santiago"
        assert weak["content"] in HARD["mistakes"]
        assert (strong["cost_usd"], strong["latency_s"]) == (0.02, 30.0)
        assert (weak["cost_usd"], weak["latency_s"]) == (0.001, 5.0)
        await server.call("2", "", content=strong["content"])
        record = await server.finish()
        assert (record["outcome"], record["cost_usd"], record["latency_s"]) == (1.0, 0.021, 35.0)
        assert record["tool_counts"] == {"ask_strong": 1, "ask_weak": 1}

    run(scenario, TOOLS, experts=EXPERTS)


@pytest.mark.parametrize(("domain", "difficulty", "right"), [("math", 2, True), ("law", 2, False), ("law", 1, True)])
def test_skill_is_by_domain(domain, difficulty, right):
    async def scenario(server):
        await server.open(simulation=HARD | {"domain": domain, "difficulty": difficulty})
        result = await server.call("0", "ask_weak", prompt="?")
        assert (result["content"] == "Santiago") == right

    run(scenario, TOOLS, experts=EXPERTS)


def test_a_session_has_its_own_prices():
    async def scenario(server):
        await server.open(simulation=HARD, prices={"ask_strong": {"usd_per_million_output_tokens": 1.0}})
        assert (await server.call("0", "ask_strong", prompt="?"))["cost_usd"] == 0.002

    run(scenario, TOOLS, experts=EXPERTS)


def test_chance_is_fixed_by_seed_and_strikes_as_declared():
    """The same on another server and in another order; half of the tasks, give or take four standard deviations."""

    async def answers(order):
        async with serving(TOOLS, experts=EXPERTS) as server:
            found = {}
            for number in order:
                await server.open(f"s{number}", simulation=HARD | {"answer": f"Santiago {number}"})
                calls = [(call_id, "ask_fickle", {"prompt": call_id}) for call_id in ("again", "and again")]
                first, second = await server.calls(*calls, session_id=f"s{number}")
                assert first["content"] == second["content"]
                found[number] = first["content"].startswith("Santiago")
            return found

    first = asyncio.run(answers(range(100)))
    assert first == asyncio.run(answers(reversed(range(100))))
    assert 30 <= sum(first.values()) <= 70


def test_recordings_tell_tasks_apart(tmp_path):
    recording = {"path": str(tmp_path / "recordings"), "mode": "replay"}

    async def scenario(server):
        await server.open("a", simulation=HARD)
        await server.open("b", simulation=HARD | {"answer": "Lima"})
        call = ("0", "ask_strong", {"prompt": "?"})
        (first,), (second,) = await server.calls(call, session_id="a"), await server.calls(call, session_id="b")
        assert (first["content"], second["content"]) == ("Santiago", "Lima")
        assert (second["cost_usd"], second["latency_s"]) == (0.02, 30.0)

    run(scenario, TOOLS, experts=EXPERTS, recording=recording)
    run(scenario, TOOLS, experts=EXPERTS, recording=recording | {"mode": "replay_or_fail"})


def test_records_are_computed_again_bit_for_bit(tmp_path):
    traces = tmp_path / "traces.jsonl"

    async def scenario(server):
        await server.open(simulation=HARD, verifier=VERIFIER)
        await server.call("0", "ask_weak", prompt="?")
        await server.call("1", "", content="Santiago")
        await server.finish()

    run(scenario, TOOLS, experts=EXPERTS, traces=str(traces))
    assert asyncio.run(rescore(traces, ServerConfig.model_validate({}))) == (1, [])


def test_what_is_refused():
    async def scenario(server):
        refused = [
            await server.open("a", tools=["ask_strong"]),
            await server.open("b", simulation={"difficulty": 1}),
            await server.open("c", simulation=HARD | {"domain": "law"}, tools=["narrow"]),
        ]
        assert [session["error"] for session in refused] == [
            "setup.simulation: 'ask_strong' is simulated and has to know the task's answer",
            "setup.simulation.answer: Field required",
            "expert 'narrow' declares no skill for domain 'law'; it has math; add that domain or 'default' to its skill",
        ]
        assert (await server.open("d", tools=[]))["error"] is None

    narrow = {"narrow": {"kind": "simulated", "expert": "narrow"}}
    run(scenario, TOOLS | narrow, experts=EXPERTS | {"narrow": STRONG | {"skill": {"math": 1}}})
    with pytest.raises(ValueError, match=r"tools\.ask\.expert: 'x' is not among `experts`, which has weak"):
        ServerConfig.model_validate({"tools": {"ask": {"kind": "simulated", "expert": "x"}}, "experts": {"weak": WEAK}})


def test_tool_and_alias_agree_about_an_expert():
    """The miniature world's aliases and the tools rest on one definition of skill and chance."""
    profile = ServerConfig.model_validate({"experts": EXPERTS}).experts["weak"]
    alias = SimulatedExpert("weak", profile, "math", None)
    tool = {}

    async def scenario(server):
        for difficulty in (1, 2, 3):
            await server.open(f"s{difficulty}", simulation=HARD | {"domain": "math", "difficulty": difficulty})
            (result,) = await server.calls(("0", "ask_weak", {"prompt": "?"}), session_id=f"s{difficulty}")
            tool[difficulty] = result["content"] == "Santiago", result["cost_usd"], result["latency_s"]

    run(scenario, TOOLS, experts=EXPERTS)
    assert tool == {d: (alias.succeeds(d, 0, None), alias.cost_usd, alias.latency_s) for d in (1, 2, 3)}

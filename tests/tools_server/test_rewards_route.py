"""`POST /v1/rewards` over HTTP: from sessions with a preference to the reward of each sibling."""

import asyncio
import json
import math

import pytest

from tests.tools_server.server_client import run
from tools_server.config import ServerConfig
from tools_server.rescore import rescore
from tools_server.rewards import group_rewards

TOOLS = {
    name: {"kind": "constant", "answer": name, "usd_per_call": usd, "latency_s": seconds}
    for name, usd, seconds in (("cheap", 0.01, 3.0), ("dear", 0.2, 1.0))
}
PREFERENCE = {"outcome": 1.0, "cost": 0.5, "latency": 0.25, "dear": -0.125}
SETUP = {"question": "?", "verifier": {"kind": "exact", "answers": ["yes"]}}


async def play(server, name, tool, answer, preference):
    session = {"session_id": name, "environment": "tools", "setup": SETUP, "seed": 0, "preference": preference}
    [opened] = (await server.post("/v1/sessions", {"sessions": [session]}))["sessions"]
    assert opened["error"] is None
    await server.calls(("0", tool, {}), ("1", "", {"content": answer}), session_id=name)
    return await server.finish(name)


async def reward(server, *groups):
    return (await server.post("/v1/rewards", {"groups": list(groups)}))["rewards"]


async def refused(server, payload, path="/v1/rewards"):
    async with server.http.post(server.url + path, json=payload) as response:
        return response.status, (await response.json())["error"]


def test_siblings_are_scored_by_the_preference_they_were_opened_with(tmp_path):
    """Values are those of `group_rewards`, and traces hold what is needed to make them again."""

    async def scenario(server):
        records = [
            await play(server, f"s/{i}", tool, answer, PREFERENCE)
            for i, (tool, answer) in enumerate([("cheap", "yes"), ("dear", "yes"), ("cheap", "no")])
        ]
        assert all(record["preference"] == PREFERENCE for record in records)
        [rewards] = await reward(server, {"records": records})
        assert [one["session_id"] for one in rewards] == ["s/0", "s/1", "s/2"]
        assert rewards[0]["components"] == {"outcome": 1.0, "cost": 1.0, "latency": 0.0, "dear": 0.0}
        assert rewards[1]["components"] == {"outcome": 1.0, "cost": 0.0, "latency": 1.0, "dear": 1.0}
        assert [one["value"] for one in rewards] == [1.5, 1.125, 0.0]
        assert [one["reason"] for one in rewards] == ["solved", "solved", "not solved"]
        columns = ([record[name] for record in records] for name in ("outcome", "cost_usd", "latency_s", "tool_counts"))
        assert [one["value"] for one in rewards] == group_rewards(*columns, [True] * 3, PREFERENCE, 0.0)
        [[*_, worst]] = await reward(server, {"records": records, "malformed": ["s/2"], "invalid_reward": -0.5})
        assert (worst["value"], worst["valid"], worst["reason"]) == (-0.5, True, "malformed")
        assert worst["inputs_digest"] != rewards[0]["inputs_digest"] == rewards[1]["inputs_digest"]
        # What the client adds for its orchestrator's own tokens counts like any other cost.
        own = [
            record | {"cost_usd": record["cost_usd"] + extra} for record, extra in zip(records, (1, 0, 0), strict=True)
        ]
        [[dearer, *_]] = await reward(server, {"records": own})
        assert dearer["components"]["cost"] == 0.0

    traces = tmp_path / "traces.jsonl"
    run(scenario, TOOLS, traces=str(traces))
    assert [json.loads(line)["record"]["preference"] for line in traces.read_text().splitlines()] == [PREFERENCE] * 3


def test_stored_preferences_are_rescored(tmp_path):
    traces = tmp_path / "traces.jsonl"
    run(lambda server: play(server, "a", "cheap", "yes", PREFERENCE), TOOLS, traces=str(traces))
    config = ServerConfig.model_validate({"tools": TOOLS})
    assert asyncio.run(rescore(traces, config)) == (1, [])


@pytest.mark.parametrize("error", ["infra_error", "env_error", "unknown_session"])
def test_what_the_infrastructure_lost_is_no_reward_and_in_no_statistic(error):
    async def scenario(server):
        records = [await play(server, f"{i}", tool, "yes", PREFERENCE) for i, tool in enumerate(("cheap", "dear"))]
        lost = records[0] | {"session_id": "lost", "cost_usd": 99.0, "outcome": 0.0, "error": error}
        [alone] = await reward(server, {"records": records})
        [[*same, none]] = await reward(server, {"records": [*records, lost]})
        assert [one["value"] for one in same] == [one["value"] for one in alone]
        assert (none["valid"], none["value"], none["components"]) == (False, 0.0, {})
        assert none["reason"] == f"left out: {error}"
        [[nobody]] = await reward(server, {"records": [lost]})
        assert not nobody["valid"]

    run(scenario, TOOLS)


def test_mistakes_are_one_line():
    async def scenario(server):
        record = await play(server, "a", "cheap", "yes", PREFERENCE)
        for status, change, line in (
            (400, {"records": []}, "groups[0].records: expected one or more"),
            (409, {"records": [record, record]}, "groups[0].records: expected each of another session"),
            (400, {"malformd": []}, "groups[0]: expected an object with the fields records, malformed, invalid_reward"),
            (409, {"malformed": ["b"]}, "groups[0].malformed: 'b' is none of the records' sessions"),
            (400, {"records": [{"session_id": "a"}]}, "groups[0].records.0.outcome: Field required"),
            (
                409,
                {"records": [record, record | {"session_id": "b", "preference": {}}]},
                "groups[0].records[1].preference: siblings have one preference, this is not that of records[0]",
            ),
            (
                400,
                {"records": [record | {"preference": {"cost": 1e7}}]},
                "groups[0].records[0].preference.cost: expected a number from -1e+06 to 1e+06",
            ),
            (
                400,
                {"records": [record | {"cost_usd": math.inf}]},
                "groups[0].records[0].cost_usd: expected a finite number of at least 0",
            ),
            (
                400,
                {"records": [record | {"outcome": 2}]},
                "groups[0].records[0].outcome: expected a number from 0 to 1",
            ),
        ):
            assert await refused(server, {"groups": [{"records": [record]} | change]}) == (status, line)

    run(scenario, TOOLS)


@pytest.mark.parametrize("weight", [math.nan, "much", True, None, 10**400], ids=["nan", "text", "bool", "null", "huge"])
def test_a_session_with_no_number_for_a_weight_is_refused(weight):
    async def scenario(server):
        session = {"session_id": "a", "environment": "tools", "setup": {}, "preference": {"cost": weight}}
        line = "sessions[0].preference.cost: expected a number from -1e+06 to 1e+06"
        assert await refused(server, {"sessions": [session]}, "/v1/sessions") == (400, line)

    run(scenario, TOOLS)

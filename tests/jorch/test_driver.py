"""The rollout driver with a real tool server in a process of its own; only the sampler is a double, which says
what a test scripts.
"""

import asyncio
import contextlib
import itertools
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import yaml

from jorch.data.chat import render_observation, render_prompt
from jorch.data.qwen3_chat import render
from jorch.rl.samples import from_trajectory
from jorch.rollout.driver import Driver
from jorch.rollout.own_tokens import own_tokens
from jorch.rollout.tool_client import ToolClient, ToolServerDown
from jorch.sections import ChatConfig, OrchestratorPrice, RolloutConfig
from jorch.synth.miniature import call_text, catalogue, make_task
from jorch.synth.sft import train_tokenizer
from jorch.types import Completion, CompletionRequest, Task, Turn

TOKENIZER = train_tokenizer()
END = "<|im_end|>"

# A server with one more environment, whose experts break down.
SERVER = """
import sys
from tools_server import registry
from tools_server.environment import Observation

class Broken:
    blocking = False

    def __init__(self, setup, seed, config):
        self.setup = setup
        self.tools = [{"type": "function", "function": {"name": "work", "parameters": {"type": "object"}}}]
        self.messages = [{"role": "user", "content": "the environment speaks"}]

    def call(self, name, arguments):
        if self.setup["breaks"] == "infrastructure":
            return Observation(name, "no answer", 0.5, 1.0, "infra_error", ended=True)
        if self.setup["breaks"] == "call":
            raise KeyError("a bug")
        return Observation(name, "done", 0.5, 1.0, ended=True)

    def outcome(self):
        if self.setup["breaks"] == "outcome":
            raise KeyError("a bug")
        return 1.0

registry._imported["broken"] = Broken
from tools_server.__main__ import main
sys.exit(main())
"""


class Server:
    """A tool server that can be killed and started again at the same address."""

    def __init__(self, folder, **options):
        self.config = folder / "server.yaml"
        self.config.write_text(yaml.safe_dump({"experts": catalogue(), **options}))
        self.port = 0
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVER, "--config", str(self.config), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


class ScriptedSampler:
    """Says the texts of a task's script, one a turn, each with its end of turn unless it ends in "...": then it was
    cut off by the limit."""

    policy_version = 3

    def __init__(self, script: dict[str, list[str]], max_context_tokens=400):
        self.script, self.max_context_tokens = script, max_context_tokens
        self.requests: list[CompletionRequest] = []
        self.expected: list[str] = []
        self.turns: dict[str, int] = defaultdict(int)
        self.before_turn: Callable[[str, int], Awaitable[None]] | None = None

    def connected(self):
        return contextlib.nullcontext()

    def expect(self, trajectory_ids):
        self.expected += trajectory_ids

    async def complete(self, request):
        self.requests.append(request)
        number = self.turns[request.trajectory_id]
        self.turns[request.trajectory_id] += 1
        task_id = request.trajectory_id.split("/")[-2]
        if self.before_turn:
            await self.before_turn(task_id, number)
        text = self.script[task_id][number]
        cut = text.endswith("...")
        ids = TOKENIZER.encode(text.removesuffix("...") if cut else text + END)
        versions = np.full(len(ids), self.policy_version, np.int32)
        return Completion(ids, np.full(len(ids), -0.5, np.float32), "length" if cut else "stop", versions)

    def release(self, trajectory_id):
        self.turns.pop(trajectory_id, None)


ROLLOUT = RolloutConfig(
    max_turns=6, max_tokens_per_turn=40, temperature=1.0, max_malformed_calls=2, call_timeout_s=30, call_retries=0
)


def roll_out(server, tasks, sampler, group_size=1, seed=0, **changes):
    """Trajectories of each task."""

    async def run():
        async with ToolClient(server.url, timeout_s=30, retries=changes.pop("call_retries", 0)) as tools:
            chat = changes.pop("chat", ChatConfig())
            driver = Driver(sampler, tools, TOKENIZER, chat, ROLLOUT.model_copy(update=changes))
            return await driver.run_groups(tasks, group_size, run_id="step-0", seed=seed, temperature=0.7)

    return asyncio.run(run())


def roll_out_one(server, task, texts, **changes):
    max_context_tokens = changes.pop("max_context_tokens", 400)
    [[trajectory]] = roll_out(server, [task], ScriptedSampler({task.task_id: texts}, max_context_tokens), **changes)
    return trajectory


def a_task(**truth) -> Task:
    """A miniature task that needs a search, and with which a test can find its aliases."""
    for i in range(1000):
        task = make_task(random.Random(i), False, "task-0", "train")
        skills = [e["skill"] for e in task.truth["experts"].values()]
        incapable = [a for a, e in task.truth["experts"].items() if a not in task.truth["capable"][e["function"]]]
        if (
            task.truth["needs"] == ["search"]
            and len(set(skills)) == 3
            and any(a.startswith("search") for a in incapable)
        ):
            return task
    raise AssertionError


TASK = a_task()
SEARCH, ANSWER = TASK.truth["capable"]["search"][0], TASK.truth["capable"]["answer"][0]
FAILING = next(f"search-{i}" for i in (1, 2, 3) if f"search-{i}" not in TASK.truth["capable"]["search"])
BAD_CALL = "<tool_call>{</tool_call>"


def bill(aliases):
    experts = TASK.truth["experts"]
    return sum(experts[a]["cost_usd"] for a in aliases), sum(experts[a]["latency_s"] for a in aliases)


def test_a_trajectory_in_full(server):
    """A failed search, a good one, the answer: tokens, calls, results and the bill, turn by turn."""
    texts = [call_text(FAILING), f"<think>hm</think>{call_text(SEARCH)}", call_text(ANSWER)]
    trajectory = roll_out_one(server, TASK, texts)
    assert (trajectory.task_id, trajectory.termination, trajectory.outcome) == ("task-0", "answered", 1.0)
    assert (trajectory.num_malformed, trajectory.format_valid) == (0, True)
    assert trajectory.policy_version_min == trajectory.policy_version_max == 3
    cost_usd, latency_s = bill([FAILING, SEARCH, ANSWER])
    assert (trajectory.cost_usd, trajectory.latency_s) == pytest.approx((cost_usd, latency_s))
    assert trajectory.tool_counts == {FAILING: 1, SEARCH: 1, ANSWER: 1}

    expected = TOKENIZER.encode(render_prompt(TASK.messages, TASK.tools, "compact"))
    seen = [("none", "tool_error", False), ("documents", None, False), ("answered", None, True)]
    for turn, text, alias, (content, error, ended) in zip(
        trajectory.turns, texts, (FAILING, SEARCH, ANSWER), seen, strict=True
    ):
        np.testing.assert_array_equal(turn.prompt_token_ids, expected)
        np.testing.assert_array_equal(turn.completion.token_ids, TOKENIZER.encode(text + END))
        [call], [result] = turn.calls, turn.results
        assert call.arguments == {"model": alias}
        assert (result.tool, result.content, result.error, result.ended) == (alias, content, error, ended)
        observation = TOKENIZER.encode(render_observation([content], "compact"))
        expected = np.concatenate([expected, turn.completion.token_ids, observation])
    results = [result for turn in trajectory.turns for result in turn.results]
    assert trajectory.cost_usd == pytest.approx(sum(result.cost_usd for result in results))
    assert trajectory.latency_s == pytest.approx(sum(result.latency_s for result in results))
    assert trajectory.tool_counts == Counter(result.tool for result in results)


def test_a_history_rendered_again_keeps_what_was_sampled_or_begins_anew(server):
    """An empty thought is nothing to Qwen3's template, a real one is kept as long as only tools have spoken."""
    texts = [
        f"<think>\n\n</think>\n\n{call_text(FAILING)}",
        f"<think>\nhm\n</think>\n\n{call_text(SEARCH)}",
        call_text(ANSWER),
    ]
    chat = ChatConfig(style="qwen3", history="template")
    trajectory = roll_out_one(server, TASK, texts, chat=chat, max_context_tokens=10_000)
    assert (trajectory.termination, trajectory.outcome) == ("answered", 1.0)
    messages, extends = list(TASK.messages), []
    for turn, text, content in zip(trajectory.turns, texts, ("none", "documents", ""), strict=True):
        assert TOKENIZER.decode(turn.prompt_token_ids) == render(messages, TASK.tools, add_generation_prompt=True)
        messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": content}]
    for before, after in itertools.pairwise(trajectory.turns):
        tokens = np.concatenate([before.prompt_token_ids, before.completion.token_ids])
        extends.append(np.array_equal(after.prompt_token_ids[: len(tokens)], tokens))
    assert extends == [False, True]
    assert len(list(from_trajectory(trajectory, 1.0))) == 2


def test_calls_of_one_completion_run_in_order_until_the_end(server):
    """The answer counts the search before it; what stands behind the answer is neither called nor recorded."""
    trajectory = roll_out_one(server, TASK, [call_text(SEARCH) + call_text(ANSWER) + call_text(FAILING) + BAD_CALL])
    [turn] = trajectory.turns
    assert [call.arguments["model"] for call in turn.calls] == [SEARCH, ANSWER]
    assert [result.tool for result in turn.results] == [SEARCH, ANSWER, ""]
    assert trajectory.tool_counts == {SEARCH: 1, ANSWER: 1}
    assert (trajectory.termination, trajectory.outcome, trajectory.num_malformed) == ("answered", 1.0, 1)
    assert not trajectory.format_valid
    backwards = roll_out_one(server, TASK, [call_text(ANSWER) + call_text(SEARCH)])
    assert (backwards.termination, backwards.outcome, backwards.tool_counts) == ("answered", 0.0, {ANSWER: 1})


def test_a_malformed_call_is_an_observation_and_counted(server):
    trajectory = roll_out_one(server, TASK, [BAD_CALL, call_text(SEARCH), call_text(ANSWER)])
    assert (trajectory.termination, trajectory.outcome, trajectory.num_malformed) == ("answered", 1.0, 1)
    assert not trajectory.format_valid
    seen = TOKENIZER.decode(trajectory.turns[1].prompt_token_ids)
    assert "<tool_response>error: tool call is not valid JSON</tool_response>" in seen


@pytest.mark.parametrize(
    "text",
    [
        BAD_CALL,
        "<tool_call>" + json.dumps({"name": "fly", "arguments": {}}) + "</tool_call>",
        "<tool_call>" + json.dumps({"name": "search", "arguments": {"model": "search-9"}}) + "</tool_call>",
        "<tool_call>" + json.dumps({"name": "search", "arguments": {"model": [SEARCH]}}) + "</tool_call>",
        "<tool_call>" + json.dumps({"name": "search", "arguments": {"model": SEARCH, "q": 1}}) + "</tool_call>",
        '<tool_call>{"name": "search", "arguments": {"\\ud800": 1}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"model": ' + "[" * 970 + "]" * 970 + "}}</tool_call>",
        "just talk",
        "",
        f"<think>{call_text(SEARCH)}",
        f"{call_text(SEARCH)}</think>nothing",
    ],
)
def test_malformed_calls_end_a_trajectory_as_invalid(text, server):
    """Whatever the mistake: nothing is billed, and the limit ends it."""
    trajectory = roll_out_one(server, TASK, [text] * 3, max_context_tokens=10_000)
    assert (trajectory.termination, trajectory.num_malformed, trajectory.outcome) == ("invalid", 2, 0.0)
    assert (len(trajectory.turns), trajectory.cost_usd, trajectory.format_valid) == (2, 0.0, False)
    assert not any(SEARCH in result.tool for turn in trajectory.turns for result in turn.results)


def test_calls_inside_thoughts_are_not_executed(server):
    thought = f"<think>{call_text(FAILING)}{BAD_CALL}</think>"
    trajectory = roll_out_one(server, TASK, [thought + call_text(SEARCH), call_text(ANSWER)])
    assert (trajectory.outcome, trajectory.num_malformed) == (1.0, 0)
    assert trajectory.tool_counts == {SEARCH: 1, ANSWER: 1}


def test_repeating_an_alias_ends_a_trajectory_unsolved(server):
    """A bad idea, but no malformed call."""
    trajectory = roll_out_one(server, TASK, [call_text(SEARCH)] * 2)
    assert (trajectory.termination, trajectory.num_malformed, trajectory.format_valid) == ("ended", 0, True)
    assert (trajectory.outcome, trajectory.cost_usd) == (0.0, pytest.approx(bill([SEARCH])[0]))


def test_max_turns(server):
    trajectory = roll_out_one(server, TASK, [call_text(SEARCH), call_text(ANSWER)], max_turns=1)
    assert (trajectory.termination, trajectory.outcome, len(trajectory.turns)) == ("max_turns", 0.0, 1)
    assert trajectory.cost_usd == pytest.approx(bill([SEARCH])[0]), "what was spent is spent"


def test_max_tokens_of_a_completion(server):
    trajectory = roll_out_one(server, TASK, [call_text(SEARCH), call_text(ANSWER) + "..."])
    assert trajectory.termination == "answered", "a call that is whole counts, though the completion was cut off"
    trajectory = roll_out_one(server, TASK, ["so I think..."])
    assert (trajectory.termination, trajectory.outcome) == ("max_tokens", 0.0)
    trajectory = roll_out_one(server, TASK, [f"{call_text(SEARCH)}<tool_call>..."])
    assert (trajectory.termination, trajectory.num_malformed) == ("max_tokens", 1)
    assert trajectory.tool_counts == {SEARCH: 1}


@pytest.mark.parametrize(("room", "num_turns"), [(-1, 0), (0, 1), (8, 2)])
def test_max_tokens_of_the_context(room, num_turns, server):
    """A turn begins only if prompt and longest completion fit; a turn here adds 7 tokens."""
    prompt = TOKENIZER.encode(render_prompt(TASK.messages, TASK.tools, "compact"))
    trajectory = roll_out_one(
        server,
        TASK,
        [call_text(SEARCH), call_text(FAILING), call_text(ANSWER)],
        max_context_tokens=len(prompt) + ROLLOUT.max_tokens_per_turn + room,
    )
    assert (trajectory.termination, trajectory.outcome, len(trajectory.turns)) == ("max_tokens", 0.0, num_turns)


def broken(breaks):
    return replace(TASK, environment="broken", setup={"breaks": breaks}, tools=(), messages=())


WORK = '<tool_call>{"name": "work", "arguments": {}}</tool_call>'


def test_an_environment_brings_its_own_chat(server):
    trajectory = roll_out_one(server, broken("nothing"), [WORK])
    assert (trajectory.termination, trajectory.outcome, trajectory.cost_usd) == ("answered", 1.0, 0.5)
    assert "the environment speaks" in TOKENIZER.decode(trajectory.turns[0].prompt_token_ids)


@pytest.mark.parametrize("breaks", ["call", "outcome"])
def test_an_environment_that_breaks_is_an_env_error(breaks, server):
    """Data, not a crash: the trajectory counts, with outcome 0."""
    trajectory = roll_out_one(server, broken(breaks), [WORK])
    assert (trajectory.termination, trajectory.outcome) == ("env_error", 0.0)
    assert len(trajectory.turns) == 1


def test_a_failing_infrastructure_is_no_outcome(server):
    """What the tools need is down: the attempt says nothing about the policy, and its siblings keep theirs."""
    down, up = replace(broken("infrastructure"), task_id="down"), broken("nothing")
    sampler = ScriptedSampler({"down": [WORK], up.task_id: [WORK]})
    [[lost], [kept]] = roll_out(server, [down, up], sampler, trajectory_retries=2)
    assert (lost.termination, lost.turns, lost.cost_usd) == ("infra_error", (), 0.0)
    assert (kept.termination, kept.outcome) == ("answered", 1.0)
    assert sum("down" in request.trajectory_id for request in sampler.requests) == 3
    with pytest.raises(ToolServerDown, match="what its tools need is down"):
        roll_out(server, [down], ScriptedSampler({"down": [WORK]}))


QUICK = replace(TASK, task_id="quick")


def restarted(folder, texts, retries, tasks=(TASK, QUICK)):
    """Trajectories of tasks of which the first loses its server before its second turn, when QUICK is done; and the
    sampler."""
    server = Server(folder)
    sampler = ScriptedSampler({TASK.task_id: texts, QUICK.task_id: [call_text(ANSWER)]})
    restarts = []

    async def restart(task_id, number):
        if (task_id, number) == (TASK.task_id, 1) and not restarts:
            if QUICK in tasks:
                async with ToolClient(server.url, timeout_s=30, retries=0) as tools:
                    while (await tools.health())["sessions"] > 1:
                        await asyncio.sleep(0.01)
            restarts.append(server.kill())
            server.start()

    sampler.before_turn = restart
    try:
        groups = roll_out(server, tasks, sampler, trajectory_retries=retries, call_retries=2)
    finally:
        server.kill()
    return [trajectory for [trajectory] in groups], sampler


def test_a_lost_session_is_an_infra_error_once_the_retries_are_spent(tmp_path):
    [lost, quick], _ = restarted(tmp_path, [call_text(SEARCH), call_text(ANSWER)], retries=0)
    assert (lost.termination, lost.outcome, lost.turns) == ("infra_error", 0.0, ())
    assert (lost.cost_usd, lost.tool_counts) == (0.0, {})
    assert (quick.termination, quick.tool_counts) == ("answered", {ANSWER: 1})


def test_a_session_lost_before_its_verdict_is_an_infra_error(tmp_path):
    """The second completion calls nothing (it was cut off), so only `finish` notices."""
    [lost, _], _ = restarted(tmp_path, [call_text(SEARCH), "<tool_call>..."], retries=0)
    assert lost.termination == "infra_error"


def test_a_lost_session_is_tried_again_from_the_start(tmp_path):
    [again, _], sampler = restarted(tmp_path, [call_text(SEARCH), call_text(ANSWER)], retries=1)
    assert (again.termination, again.outcome, len(again.turns)) == ("answered", 1.0, 2)
    requests = [r for r in sampler.requests if TASK.task_id in r.trajectory_id]
    for first, second in zip(requests[:2], requests[2:], strict=True):
        np.testing.assert_array_equal(first.prompt_token_ids, second.prompt_token_ids)
        assert first.seed == second.seed


def test_a_server_that_lost_every_session_stops_the_run(tmp_path):
    with pytest.raises(ToolServerDown, match=r"tool server http://.* lost all sessions of step-0: it was restarted"):
        restarted(tmp_path, [call_text(SEARCH), call_text(ANSWER)], retries=0, tasks=(TASK,))


def test_a_dead_server_stops_the_run_with_its_address(tmp_path):
    server = Server(tmp_path)
    tasks = [replace(TASK, task_id=f"task-{i}") for i in range(3)]
    sampler = ScriptedSampler({task.task_id: [call_text(SEARCH)] * 2 for task in tasks})

    everyone = asyncio.Barrier(6)

    async def kill(task_id, number):
        """Once nothing is under way any more: the answers of a stream come one by one."""
        if number == 1 and await everyone.wait() == 0:
            server.kill()

    sampler.before_turn = kill
    with pytest.raises(ToolServerDown, match=rf"tool server {server.url} does not answer \(1 attempt at /v1/calls\)"):
        roll_out(server, tasks, sampler, group_size=2)


def test_a_refused_task_is_named(server):
    stranger = replace(TASK, setup={"model_mapping": {"search-1": "nobody"}})
    with pytest.raises(ValueError, match="the tool server refused task task-0: .*unknown expert 'nobody'"):
        roll_out_one(server, stranger, [call_text(SEARCH)])


def test_an_error_of_the_sampler_arrives_as_it_is(server):
    sampler = ScriptedSampler({TASK.task_id: [call_text(SEARCH)] * 3})

    async def fail(task_id, number):
        raise MemoryError("out of memory")

    sampler.before_turn = fail
    with pytest.raises(MemoryError, match="out of memory"):
        roll_out(server, [TASK], sampler, group_size=4)


def test_groups_come_in_order_and_siblings_differ_in_their_noise_only(server):
    tasks = [replace(TASK, task_id=f"task-{i}") for i in (2, 0, 1)]
    script = {task.task_id: [call_text(SEARCH), call_text(ANSWER)] for task in tasks}
    sampler, again, other = ScriptedSampler(script), ScriptedSampler(script), ScriptedSampler(script)
    groups = roll_out(server, tasks, sampler, group_size=4)
    assert [[t.task_id for t in group] for group in groups] == [[task.task_id] * 4 for task in tasks]
    trajectory_ids = [t.trajectory_id for group in groups for t in group]
    assert sampler.expected == trajectory_ids
    assert len(set(trajectory_ids)) == 12
    assert len({request.seed for request in sampler.requests}) == 24
    assert all(0 <= request.seed < 2**63 for request in sampler.requests)
    assert {request.temperature for request in sampler.requests} == {0.7}
    roll_out(server, tasks, again, group_size=4)
    roll_out(server, tasks, other, group_size=4, seed=1)

    def seeds(sampler):
        return {(r.trajectory_id, len(r.prompt_token_ids)): r.seed for r in sampler.requests}

    assert seeds(again) == seeds(sampler)
    assert set(seeds(other).values()).isdisjoint(seeds(sampler).values())


def test_the_same_task_may_occur_twice_in_a_batch(server):
    sampler = ScriptedSampler({TASK.task_id: [call_text(SEARCH), call_text(ANSWER)]})
    groups = roll_out(server, [TASK, TASK], sampler, group_size=2)
    assert [t.outcome for group in groups for t in group] == [1.0] * 4
    assert len({t.trajectory_id for group in groups for t in group}) == 4


@pytest.mark.parametrize(("cached", "as_billed"), [(None, 300.0), (20.0, 20.0)])
def test_the_orchestrators_own_tokens_are_billed(server, cached, as_billed):
    """A turn's prompt begins with the one before and its completion, which are cached by then."""
    texts = [call_text(SEARCH), call_text(ANSWER)]
    price = {
        "usd_per_million_input_tokens": 300.0,
        "usd_per_million_cached_tokens": cached,
        "usd_per_million_output_tokens": 7000.0,
        "seconds_per_output_token": 0.5,
    }
    free, billed = (
        roll_out_one(server, TASK, texts, orchestrator=OrchestratorPrice.model_validate(of)) for of in ({}, price)
    )
    first, second = ((len(t.prompt_token_ids), len(t.completion.token_ids)) for t in billed.turns)
    output, held = first[1] + second[1], first[0] + first[1]
    fresh = first[0] + second[0] - held
    assert billed.cost_usd - free.cost_usd == pytest.approx((fresh * 300 + held * as_billed + output * 7000) / 1e6)
    assert billed.latency_s - free.latency_s == pytest.approx(output * 0.5)


def test_a_prompt_that_differs_is_not_cached_from_there_on():
    def turn(prompt, completion):
        versions = np.zeros(len(completion), np.int32)
        sampled = Completion(np.array(completion, np.int32), np.zeros(len(completion), np.float32), "stop", versions)
        return Turn(np.array(prompt, np.int32), sampled, (), ())

    assert own_tokens([]) == (0, 0, 0)
    assert own_tokens([turn([1, 2, 3], [4, 5]), turn([1, 2, 3, 9, 5, 6], [7]), turn([1], [])]) == (6, 4, 3)


def test_a_long_prompt_loses_its_middle(server):
    whole = TOKENIZER.encode(render_prompt(TASK.messages, TASK.tools, "compact"))
    trajectory = roll_out_one(server, TASK, [call_text(SEARCH)], max_prompt_tokens=11, max_turns=1)
    assert trajectory.turns[0].prompt_token_ids.tolist() == [*whole[:5], *whole[-6:]]


def test_who_misses_the_deadline_is_named_and_its_siblings_stay(server, capsys):
    sampler = ScriptedSampler({TASK.task_id: [call_text(SEARCH), call_text(ANSWER)]})
    slow = f"step-0/0/{TASK.task_id}/1"
    never = asyncio.Event()

    async def hold(task_id, number):
        if number == 1 and sampler.requests[-1].trajectory_id == slow:
            await never.wait()

    sampler.before_turn = hold
    [group] = roll_out(server, [TASK], sampler, group_size=3, group_deadline_s=2.0)
    assert [t.termination for t in group] == ["answered", "deadline", "answered"]
    assert [t.lost for t in group] == [False, True, False]
    assert (group[1].trajectory_id, group[1].turns) == (slow, ())
    assert capsys.readouterr().out == f"not done after 2 s, left out: {slow}\n"
    assert not sampler.turns, "the sampler may forget all three"


@pytest.mark.slow
def test_a_sampler_that_is_slower_than_the_lease_loses_no_session(tmp_path):
    """It thinks for two and a half leases before the second turn; nothing is played again."""

    async def think(task_id, number):
        await asyncio.sleep(3.75 if number == 1 else 0)

    server = Server(tmp_path, session_ttl_s=1.5)
    try:
        sampler = ScriptedSampler({TASK.task_id: [call_text(SEARCH), call_text(ANSWER)]})
        sampler.before_turn = think
        [[trajectory]] = roll_out(server, [TASK], sampler)
    finally:
        server.kill()
    assert (trajectory.termination, trajectory.outcome, len(sampler.requests)) == ("answered", 1.0, 2)

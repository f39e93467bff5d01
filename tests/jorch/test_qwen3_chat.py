"""Qwen3's chat text. The oracle is the model's own Jinja template, on real conversations and on any that come to mind."""

import json
import os
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jorch.data import tokenizer as tokenizers
from jorch.data.chat import render_observation
from jorch.data.conversation import Conversation
from jorch.data.qwen3_chat import render
from jorch.rl.samples import from_trajectory
from jorch.sections import TokenizerConfig
from jorch.synth.sft import train_tokenizer
from jorch.types import Completion, Trajectory, Turn

SHARED = Path(os.environ.get("JORCH_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
END = "<|im_end|>"
TOKENIZER = train_tokenizer()


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name} in {SHARED}: set JORCH_SHARED_DATA to a folder with it")
    return path


@pytest.fixture(scope="module")
def qwen3():
    """Qwen3's own chat template, in an environment set up as transformers does."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    config = json.loads(shared("qwen3/tokenizer_config.json").read_text())
    template = environment.from_string(config["chat_template"])

    def oracle(messages, tools=(), **options):
        return template.render(messages=messages, tools=tools, **options)

    return oracle


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {
        "type": "function",
        "function": {"name": name, "description": f"The {name} \u2013 tool.", "parameters": parameters},
    }


TOOLS = [tool("search", query={"type": "string"}), tool("answer", model={"enum": ["answer-1", "answer-2"]})]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def real_conversations():
    """40 and more: FRAMES' questions, as asked, searched for, thought about and followed up; ToolScale's domains."""
    rows = [json.loads(line) for line in shared("frames/frames_24.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        ask = {"role": "user", "content": row["question"]}
        thought = f"I should look this up.\n\n{row['question'][:40]}"
        searching = {
            "role": "assistant",
            "content": "",
            "reasoning_content": thought,
            "tool_calls": [call("search", query=row["question"])],
        }
        found = [{"role": "tool", "content": f"{row['id']}: {i}"} for i in range(1 + number % 3)]
        answering = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{row['answer']}"}
        more = {"role": "user", "content": "Are you sure?"}
        system = [{"role": "system", "content": "Be brief."}] * (number % 2)
        yield [*system, ask, searching, *found], TOOLS[: number % 3]
        yield [*system, ask, searching, *found, answering, more], TOOLS[: number % 3]
    for domain in ("bank", "restaurant"):
        policy = shared(f"toolscale/{domain}/policy.md").read_text()
        database = json.loads(shared(f"toolscale/{domain}/db.json").read_text())
        for name, table in list(database.items())[:4]:
            asked = [{"role": "system", "content": policy}, {"role": "user", "content": f"Show {name}."}]
            looking = {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [call("read", table=name), call("read", table="x")],
            }
            answer = {"role": "tool", "content": json.dumps(table)[:2000]}
            yield [*asked, looking, answer, answer, {"role": "assistant", "content": "Done."}], [tool("read")]


def test_real_conversations(qwen3):
    conversations = list(real_conversations())
    assert len(conversations) >= 40
    for messages, tools in conversations:
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            assert render(messages, tools, **options) == qwen3(messages, tools, **options)


words = st.lists(
    st.one_of(
        st.sampled_from(["<think>", "</think>", "\n", "\n\n", "<tool_response>", "</tool_response>", END, " "]),
        st.text(max_size=4),
    ),
    max_size=5,
).map("".join)
functions = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    st.text(max_size=5),
    st.one_of(st.dictionaries(st.text(max_size=3), words, max_size=2), st.just('{"as": "text"}')),
)
tool_calls = st.lists(st.one_of(functions, functions.map(lambda f: {"type": "function", "function": f})), max_size=3)
contents = st.one_of(words, st.none())
messages = st.one_of(
    st.builds(lambda content: {"role": "user", "content": content}, contents),
    st.builds(lambda content: {"role": "tool", "content": content}, contents),
    st.builds(lambda content: {"role": "system", "content": content}, words),
    st.builds(
        lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls}, contents, tool_calls
    ),
    st.builds(
        lambda content, thought: {"role": "assistant", "content": content, "reasoning_content": thought},
        contents,
        contents,
    ),
)


@given(
    st.lists(messages, min_size=1, max_size=6),
    st.lists(st.builds(tool, st.text(max_size=5)), max_size=2),
    st.booleans(),
    st.booleans(),
)
@example([{"role": "assistant", "content": "<think>a</think>b"}], [], False, True)
@settings(derandomize=True, deadline=None, max_examples=250)
def test_any_conversation(qwen3, messages, tools, add_generation_prompt, enable_thinking):
    options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
    assert render(messages, tools, **options) == qwen3(messages, tools, **options)


def test_an_observation_continues_qwen3s_chat(qwen3):
    """Whatever was thought: no user has spoken since."""
    ask, said = {"role": "user", "content": "hello"}, "<think>\nhm\n</think>\n\na call"
    responses = [{"role": "tool", "content": content} for content in ("one", "two")]
    ours = render([ask], add_generation_prompt=True) + said + END + render_observation(["one", "two"], "qwen3")
    assert ours == qwen3([ask, {"role": "assistant", "content": said}, *responses], add_generation_prompt=True)


TURNS = st.lists(
    st.tuples(
        st.one_of(words, words.map(lambda text: f"<think>\n{text}\n</think>\n\nso"), st.just("plain")),
        st.lists(st.tuples(st.sampled_from(["tool", "tool", "user"]), words), min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=4,
)


@given(TURNS)
@example([("<think>\na\n</think>\n\nb", [("tool", "c")]), ("d", [("user", "e")])])
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_prompt_is_the_template_of_the_whole_history_and_extends_or_forks(turns):
    """The text is always the template's; the sampled ids stay exactly where it can be had by appending."""
    history = [{"role": "user", "content": "Go."}]
    conversation = Conversation(history, (), TOKENIZER, 10_000)
    prompt, text = conversation.prompt_ids, render(history, add_generation_prompt=True)
    assert TOKENIZER.decode(prompt) == text
    for said, replied in turns:
        # Not the tokenizer's own choice of pieces: a policy samples others too.
        sampled = np.concatenate([TOKENIZER.encode(character) for character in said] + [TOKENIZER.encode(END)])
        replies = [{"role": role, "content": content} for role, content in replied]
        history += [{"role": "assistant", "content": said}, *replies]
        before = np.concatenate([prompt, sampled])
        could_append = render(history, add_generation_prompt=True).startswith(text + said + END)
        prompt, text = conversation.extend(sampled, replies), render(history, add_generation_prompt=True)
        assert TOKENIZER.decode(prompt) == text
        assert np.array_equal(prompt[: len(before)], before) == could_append


@pytest.mark.parametrize(
    ("said", "reply", "num_samples"),
    [
        ("<think>\nhm\n</think>\n\ncalls", {"role": "tool", "content": "found"}, 1),
        ("<think>\nhm\n</think>\n\nasks", {"role": "user", "content": "yes"}, 2),
        ("asks", {"role": "user", "content": "yes"}, 1),
        ("<think>\n\n</think>\n\ncalls", {"role": "tool", "content": "found"}, 2),
    ],
)
def test_a_new_sample_begins_where_the_template_forgets(said, reply, num_samples):
    """A tool's answer leaves a thought, the user's drops it; of an empty thought the template keeps nothing."""
    tokenizer = tokenizers.load(TokenizerConfig(kind="huggingface", path=str(shared("qwen3"))))
    conversation = Conversation([{"role": "user", "content": "Who?"}], TOOLS, tokenizer, 10_000)
    turns = []
    for text in (said, "Jane."):
        sampled = tokenizer.encode(text + END)
        versions = np.zeros(len(sampled), np.int32)
        completion = Completion(sampled, np.zeros(len(sampled), np.float32), "stop", versions)
        turns.append(Turn(conversation.prompt_ids, completion, (), ()))
        conversation.extend(sampled, [reply])
    samples = list(from_trajectory(Trajectory("t", "t/0", tuple(turns), "answered", 1.0, 0, 0.0, 0.0, {}), 1.0))
    assert len(samples) == num_samples
    trained = [tokenizer.decode(sample.token_ids[sample.loss_mask]) for sample in samples]
    assert "".join(trained) == said + END + "Jane." + END
    assert ("hm" in tokenizer.decode(samples[-1].token_ids)) == ("hm" in said and num_samples == 1)


def test_a_first_prompt_that_lost_its_middle_stays_so():
    long = [{"role": "user", "content": "x" * 500}]
    conversation = Conversation(long, (), TOKENIZER, 60)
    first = conversation.prompt_ids
    assert len(first) == 60
    sampled = TOKENIZER.encode("<think>\n\n</think>\n\nhm" + END)
    assert np.array_equal(conversation.extend(sampled, [{"role": "tool", "content": "a"}])[:60], first), "forked"
    sampled = TOKENIZER.encode("hm" + END)
    assert np.array_equal(conversation.extend(sampled, [{"role": "tool", "content": "a"}])[:60], first), "extended"

"""Messages to tokens and sampled text to calls: whatever a model writes is data."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jorch.data.chat import (
    demonstration_tokens,
    parse_calls,
    render_observation,
    render_prompt,
    truncate_middle,
)
from jorch.synth.sft import train_tokenizer
from jorch.types import ToolCall

END = "<|im_end|>"
TOKENIZER = train_tokenizer()
seeded = settings(derandomize=True, deadline=None, max_examples=300)

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
calls = st.tuples(st.text(), st.dictionaries(st.text(), json_values, max_size=3))
fragments = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        END,
        '{"name": "a", "arguments": {}}',
        '{"name": 1}',
        "[",
        "\\ud800",
    ]
)


def write(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def has_no_tag(call):
    return "<" not in json.dumps(call, ensure_ascii=False)


@given(st.lists(st.one_of(fragments, st.text(max_size=5)), max_size=10).map("".join))
@example("<tool_call>" + "[" * 100_000 + "</tool_call>")
@example("<tool_call>" + "9" * 5000 + "</tool_call>")
@seeded
def test_anything_parses_to_calls_that_can_travel(text):
    """Never raises; a call that comes out can be sent, and its strings be encoded again."""
    parsed = parse_calls(text)
    for call in parsed.calls:
        body = json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False)
        TOKENIZER.encode(body)
    assert all("\n" not in line for line in parsed.errors)
    assert text.count("<tool_call>") >= len(parsed.calls) + len(parsed.errors) - ("<think>" in text)


@given(
    st.lists(calls.filter(has_no_tag), max_size=3),
    st.text(max_size=5).filter(lambda text: "<" not in text),
    st.booleans(),
)
@seeded
def test_what_is_written_is_read(written, between, ended):
    text = between.join(["", *(write(*call) for call in written), ""]) + (END if ended else "")
    parsed = parse_calls(text)
    assert parsed.calls == tuple(ToolCall(str(i), *call) for i, call in enumerate(written))
    assert parsed.errors == ()
    assert parsed.text == (between * (len(written) + 1)).strip()


@given(st.lists(st.one_of(fragments.filter(lambda f: f != "</think>"), st.text(max_size=5)), max_size=6).map("".join))
@seeded
def test_calls_in_thoughts_are_never_calls(thought):
    call = write("answer", {"model": "answer-1"})
    assert parse_calls(f"<think>{thought}{call}</think>{call}") == parse_calls(call)
    assert parse_calls(f"{thought}{call}</think>{call}") == parse_calls(call), "the prompt may have opened the thought"
    for unclosed in (f"<think>{thought}{call}", f"<think>a</think><think>{thought}{call}"):
        assert parse_calls(unclosed).calls == ()
        assert parse_calls(unclosed).errors == ("thinking was not closed",)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("{", "tool call is not valid JSON"),
        ("{'name': 'a'}", "tool call is not valid JSON"),
        ('{"name": "a", "arguments": {"x": NaN}}', "tool call is not valid JSON"),
        ('{"name": "a", "arguments": {"x": 1e999}}', "tool call is not valid JSON"),
        ('{"name": "a", "arguments": {"\\ud800": 1}}', "tool call is not valid JSON"),
        ('{"name": "a", "arguments": {"x": ' + "[" * 70 + "]" * 70 + "}}", "tool call is nested deeper than 64 levels"),
        ("[]", 'tool call has no "name"'),
        ('{"arguments": {}}', 'tool call has no "name"'),
        ('{"name": 3, "arguments": {}}', 'tool call has no "name"'),
        ('{"name": "a", "arguments": "{\\"model\\": \\"answer-1\\"}"}', '"arguments" is str, not a JSON object'),
        ('{"name": "a", "arguments": null}', '"arguments" is NoneType, not a JSON object'),
        ('{"name": "a", "arguments": [1]}', '"arguments" is list, not a JSON object'),
    ],
)
def test_a_malformed_call_is_one_line_among_the_others(body, error):
    good = write("search", {"model": "search-1"})
    parsed = parse_calls(f"{good}<tool_call>{body}</tool_call>{good}")
    assert parsed.errors == (error,)
    assert [call.call_id for call in parsed.calls] == ["0", "1"]


def test_a_call_that_was_cut_off_is_malformed():
    assert parse_calls('so <tool_call>{"name": "a"').errors == ("tool call was not closed",)
    assert parse_calls('so <tool_call>{"name": "a"').text == "so"


def test_a_call_without_arguments_has_none():
    assert parse_calls('<tool_call>{"name": "a"}</tool_call>').calls == (ToolCall("0", "a", {}),)


@given(st.lists(st.integers(), max_size=40), st.integers(1, 40))
@seeded
def test_truncation_keeps_head_and_tail(token_ids, most):
    kept = truncate_middle(np.array(token_ids), most).tolist()
    assert len(kept) == min(len(token_ids), most)
    if len(token_ids) > most:
        assert kept == token_ids[: most // 2] + token_ids[len(token_ids) - (most - most // 2) :]


DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who founded Datu?"},
    {"role": "assistant", "content": write("search", {"model": "search-1"})},
    {"role": "tool", "content": "documents"},
    {"role": "tool", "content": "none"},
    {"role": "assistant", "content": write("answer", {"model": "answer-1"})},
]


@pytest.mark.parametrize("style", ["compact", "qwen3"])
def test_a_demonstration_is_tokenised_as_a_rollout_would_be(style):
    """Prompt, then what the policy says up to its end of turn, then the observation; trained is what it says."""
    pieces = [
        (render_prompt(DIALOGUE[:2], (), style), False),
        (DIALOGUE[2]["content"] + END, True),
        (render_observation(["documents", "none"], style), False),
        (DIALOGUE[5]["content"] + END, True),
    ]
    encoded = [(TOKENIZER.encode(text), trained) for text, trained in pieces]
    token_ids, mask = demonstration_tokens(DIALOGUE, TOKENIZER, style)
    np.testing.assert_array_equal(token_ids, np.concatenate([ids for ids, _ in encoded]))
    np.testing.assert_array_equal(mask, np.concatenate([np.full(len(ids), trained) for ids, trained in encoded]))
    assert TOKENIZER.decode(token_ids) == "".join(text for text, _ in pieces)


@pytest.mark.parametrize("messages", [[], DIALOGUE[:2], DIALOGUE[2:3]])
def test_a_demonstration_needs_a_prompt_and_an_answer(messages):
    with pytest.raises(ValueError, match="needs a prompt and then an assistant message"):
        demonstration_tokens(messages, TOKENIZER, "compact")

"""Messages to token ids and sampled text to tool calls: the only place that knows the chat format.

Both styles are ChatML with Hermes tool calls and only ever append: a prompt, then per turn the sampled tokens and an
observation. So each prompt extends the previous tokens and a trajectory is one training sample. (Qwen3's own template
drops the thinking of earlier turns, which would break that; keeping it is a deliberate deviation. With `chat.history`
set to template, `conversation.py` does as the template does.)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jorch.data import qwen3_chat
from jorch.data.tokenizer import END_OF_TURN, Tokenizer
from jorch.types import ToolCall

_CALL_OPEN, _CALL_CLOSE = "<tool_call>", "</tool_call>"
_MAX_NESTING = 64
"""Of a call's JSON: what reads it further down the way recurses too, from a deeper stack."""

CHAT_SYMBOLS = (
    "<|im_start|>",
    END_OF_TURN,
    "<|im_start|>user\n",
    "<|im_start|>system\n",
    f"{END_OF_TURN}\n<|im_start|>assistant\n",
    "\n<|im_start|>user\n<tool_response>",
    f"</tool_response>{END_OF_TURN}\n<|im_start|>assistant\n",
    _CALL_OPEN,
    _CALL_CLOSE,
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "\n",
)
"""Strings that a tokenizer trained for this format keeps whole."""


@dataclass(frozen=True)
class ParsedCalls:
    """Well-formed calls, and one line for each malformed one."""

    calls: tuple[ToolCall, ...]
    errors: tuple[str, ...]
    text: str
    """What is left outside of thinking and calls: a message to the user."""


def render_prompt(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], style: str) -> str:
    """The first prompt, ready for the assistant's first token.

    style "compact" leaves the tools' JSON out (the messages describe them); "qwen3" is Qwen3's template.
    """
    if style == "qwen3":
        return qwen3_chat.render(messages, tools, add_generation_prompt=True)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [f"<|im_start|>system\n{system}{END_OF_TURN}\n"] if system else []
    turns += [f"<|im_start|>{m['role']}\n{m['content']}{END_OF_TURN}\n" for m in messages if m["role"] != "system"]
    return "".join(turns) + "<|im_start|>assistant\n"


def render_observation(contents: Sequence[str], style: str) -> str:
    """What follows the sampled end-of-turn token: the tools' answers and the next assistant header."""
    gap = "\n" if style == "qwen3" else ""
    responses = "\n".join(f"<tool_response>{gap}{content}{gap}</tool_response>" for content in contents)
    return f"\n<|im_start|>user\n{responses}{END_OF_TURN}\n<|im_start|>assistant\n"


def truncate_middle(token_ids: np.ndarray, max_tokens: int) -> np.ndarray:
    """Keep the head and the tail of a prompt that is too long (the released code's rule)."""
    if len(token_ids) <= max_tokens:
        return token_ids
    head = max_tokens // 2
    return np.concatenate([token_ids[:head], token_ids[len(token_ids) - (max_tokens - head) :]])


def demonstration_tokens(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, style: str
) -> tuple[np.ndarray, np.ndarray]:
    """A demonstration as (token_ids i32[n], loss_mask bool[n]); the loss covers assistant messages.

    Raises ValueError where no assistant message follows the first prompt.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if not first:
        raise ValueError("a demonstration needs a prompt and then an assistant message")
    pieces = [(render_prompt(messages[:first], (), style), False)]
    pending: list[str] = []
    for message in messages[first:]:
        if message["role"] != "assistant":
            pending.append(message["content"])
            continue
        if pending:
            pieces.append((render_observation(pending, style), False))
            pending = []
        pieces.append((message["content"] + END_OF_TURN, True))
    encoded = [(tokenizer.encode(text), trained) for text, trained in pieces]
    token_ids = np.concatenate([ids for ids, _ in encoded])
    return token_ids, np.concatenate([np.full(len(ids), trained) for ids, trained in encoded])


def parse_calls(text: str) -> ParsedCalls:
    """Read the tool calls of one completion (without or with its end-of-turn token).

    Thinking is removed first, so a call inside it is never executed. Arguments must be a JSON object; a
    double-encoded string is malformed. Never raises: a malformed call is data.
    """
    text = text.removesuffix(END_OF_TURN).rpartition("</think>")[2]
    if "<think>" in text:
        return ParsedCalls((), ("thinking was not closed",), "")
    calls: list[ToolCall] = []
    errors: list[str] = []
    rest: list[str] = []
    while True:
        before, opened, after = text.partition(_CALL_OPEN)
        rest.append(before)
        if not opened:
            break
        body, closed, text = after.partition(_CALL_CLOSE)
        if not closed:
            errors.append("tool call was not closed")
            break
        parsed = _parse_call(body, str(len(calls)))
        if isinstance(parsed, ToolCall):
            calls.append(parsed)
        else:
            errors.append(parsed)
    return ParsedCalls(tuple(calls), tuple(errors), "".join(rest).strip())


def _parse_call(body: str, call_id: str) -> ToolCall | str:
    try:
        call = json.loads(body)
        # Python reads more than JSON allows: NaN, and halves of surrogate pairs, which no tokenizer takes back.
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return "tool call is not valid JSON"
    if _is_deeper(call, _MAX_NESTING):
        return f"tool call is nested deeper than {_MAX_NESTING} levels"
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return 'tool call has no "name"'
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return f'"arguments" is {type(arguments).__name__}, not a JSON object'
    return ToolCall(call_id, call["name"], arguments)


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(child, levels - 1) for child in children)

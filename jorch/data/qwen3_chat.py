"""Qwen3's chat template in Python: the same text as the Jinja template that ships with the model, without Jinja.

The template shows the thinking of assistant turns only after the user's last message; earlier thoughts are dropped, so
the prompt of a later turn need not extend an earlier one (`conversation.py` proves it or begins anew).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jorch.data.tokenizer import END_OF_TURN

START = "<|im_start|>"
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

Message = Mapping[str, Any]
"""role, content, and where there are any: reasoning_content (assistant), tool_calls (assistant), as in OpenAI's API."""


def render(
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> str:
    """The conversation's text.

    Args:
        tools: their JSON descriptions, for the system block.
        add_generation_prompt: end with the header of the assistant's next turn.
        enable_thinking: False closes an empty thought behind that header.

    Source: `chat_template` in Qwen3's tokenizer_config.json.
    """
    last_query = _last_query(messages)
    text = [_system(messages, tools)]
    for index, message in enumerate(messages):
        content = message.get("content")
        content = content if isinstance(content, str) else ""
        match message["role"]:
            case "user" | "system" if message["role"] == "user" or index > 0:
                text.append(f"{START}{message['role']}\n{content}{END_OF_TURN}\n")
            case "assistant":
                shows_thought = index > last_query
                text.append(_assistant(message, content, shows_thought, is_last=index == len(messages) - 1))
            case "tool":
                text.append(_tool(messages, index, content))
    if add_generation_prompt:
        text.append(f"{START}assistant\n")
        if not enable_thinking:
            text.append("<think>\n\n</think>\n\n")
    return "".join(text)


def _system(messages: Sequence[Message], tools: Sequence[Any]) -> str:
    own = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    if not tools:
        return "" if own is None else f"{START}system\n{own}{END_OF_TURN}\n"
    head = "" if own is None else f"{own}\n\n"
    lines = "".join(f"\n{_json(tool)}" for tool in tools)
    return f"{START}system\n{head}{_TOOLS_HEAD}{lines}{_TOOLS_TAIL}{END_OF_TURN}\n"


def _last_query(messages: Sequence[Message]) -> int:
    """Where the user last said something, rather than a tool in the user's name."""
    for index in reversed(range(len(messages))):
        role, content = messages[index]["role"], messages[index].get("content")
        if role == "user" and isinstance(content, str) and not _is_tool_response(content):
            return index
    return len(messages) - 1


def _is_tool_response(content: str) -> bool:
    return content.startswith("<tool_response>") and content.endswith("</tool_response>")


def _assistant(message: Message, content: str, shows_thought: bool, *, is_last: bool) -> str:
    thought = message.get("reasoning_content")
    if not isinstance(thought, str):
        thought = ""
        if "</think>" in content:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
    text = [f"{START}assistant\n"]
    if shows_thought and (is_last or thought):
        stripped = thought.strip("\n")
        text.append(f"<think>\n{stripped}\n</think>\n\n" + content.lstrip("\n"))
    else:
        text.append(content)
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or call
        arguments = function["arguments"]
        arguments = arguments if isinstance(arguments, str) else _json(arguments)
        gap = "\n" if content or number else ""
        text.append(f'{gap}<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return "".join(text) + f"{END_OF_TURN}\n"


def _tool(messages: Sequence[Message], index: int, content: str) -> str:
    def is_tool(at: int) -> bool:
        return 0 <= at < len(messages) and messages[at]["role"] == "tool"

    head = "" if is_tool(index - 1) else f"{START}user"
    tail = "" if is_tool(index + 1) else f"{END_OF_TURN}\n"
    return f"{head}\n<tool_response>\n{content}\n</tool_response>{tail}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

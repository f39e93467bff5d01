"""The compact style as a Jinja template: a server that renders chats itself must show the model what training showed it."""

import json

import jinja2
import pytest

from jorch.data.chat import render_observation, render_prompt
from jorch.data.chat_template import COMPACT

USER = {"role": "user", "content": "Who founded Posi?"}
CALL = '<tool_call>{"name":"search","arguments":{"model":"search-1"}}</tool_call>'


def render(messages):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment.from_string(COMPACT).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("arguments", [{"model": "search-1"}, '{"model":"search-1"}'])
@pytest.mark.parametrize("contents", [["documents"], ["documents", "none"]])
@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be brief."}]])
def test_it_renders_what_the_model_sampled(arguments, contents, before):
    made = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    messages = [
        *before,
        USER,
        {"role": "assistant", "content": "", "tool_calls": [made]},
        *({"role": "tool", "content": content} for content in contents),
    ]
    sampled = CALL + "<|im_end|>"
    wanted = render_prompt([*before, USER], (), "compact") + sampled + render_observation(contents, "compact")
    assert render(messages) == wanted

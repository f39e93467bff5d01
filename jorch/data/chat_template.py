"""The compact chat style as a Jinja template, for servers that render chats themselves; `chat.py` is what trains."""

COMPACT = (
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user\\n' }}{%- endif %}"
    "{{- '<tool_response>' + message.content + '</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '\\n' }}{%- endif %}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- set function = call.function or call %}"
    '{{- \'<tool_call>{"name":"\' + function.name + \'","arguments":\' }}'
    "{{- function.arguments if function.arguments is string else function.arguments | tojson(separators=(',', ':')) }}"
    "{{- '}</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Messages with `tool` roles and `tool_calls` as the OpenAI API has them; without the tools' JSON, as in training.

Calls have no spaces between their tokens, as the quickstart's base writes them. `tojson` is transformers' filter.
"""

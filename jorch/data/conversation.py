"""A chat that is rendered again for every turn, as a server of Qwen3 does.

Each prompt either provably extends the tokens so far, which then stay as they were sampled, or is a new beginning.
`rl/samples.py` opens a new training sample there, so no loss falls on tokens that the policy did not see or say.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jorch.data.chat import truncate_middle
from jorch.data.qwen3_chat import Message, render
from jorch.data.tokenizer import END_OF_TURN, Tokenizer


class Conversation:
    """One trajectory's messages and the token ids of its next prompt, `prompt_ids` i32[n].

    Example: 21 prompt ids and 9 sampled ones; `extend` gives a prompt of 47 whose first 30 are these, or, where the
    user spoke and the sampled turn had a thought, a prompt of 38 without it.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Any], tokenizer: Tokenizer, max_prompt_tokens: int
    ) -> None:
        """A first prompt of more than `max_prompt_tokens` loses its middle, for good."""
        self._messages, self._tools, self._tokenizer = list(messages), tools, tokenizer
        self._text = self._first_text = self._render()
        self._max_prompt_tokens = max_prompt_tokens
        self.prompt_ids = self._first_ids = self._encode(self._text)

    def extend(self, sampled_ids: np.ndarray, replies: Sequence[Message]) -> np.ndarray:
        """The next prompt, after the assistant's sampled turn and what tools or the user said to it."""
        sampled = self._tokenizer.decode(sampled_ids)
        past = self._text + sampled
        self._messages += [{"role": "assistant", "content": sampled.removesuffix(END_OF_TURN)}, *replies]
        self._text = self._render()
        if self._text.startswith(past):
            further = self._tokenizer.encode(self._text[len(past) :])
            self.prompt_ids = np.concatenate([self.prompt_ids, sampled_ids, further])
        elif self._text.startswith(self._first_text):
            further = self._tokenizer.encode(self._text[len(self._first_text) :])
            self.prompt_ids = np.concatenate([self._first_ids, further])
        else:
            self.prompt_ids = self._encode(self._text)
        return self.prompt_ids

    def _render(self) -> str:
        return render(self._messages, self._tools, add_generation_prompt=True)

    def _encode(self, text: str) -> np.ndarray:
        return truncate_middle(self._tokenizer.encode(text), self._max_prompt_tokens)

"""The messages of a chat, and the token ids that the model's chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import ArgumentError

MESSAGES = "messages"  # the key in the metadata of a saved cache


class Conversation:
    """The messages of one chat.

    Args:
        tokenizer: mlx-lm's tokenizer.
        system: The system prompt of a new conversation.
        config: More variables for the chat template.
        metadata: The metadata of the saved cache that the conversation continues.
        before: The token ids in that cache.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        before: Sequence[int] = (),
    ):
        self._tokenizer = tokenizer
        self._template = partial(tokenizer.apply_chat_template, tokenize=False, **(config or {}))
        found = (metadata or {}).get(MESSAGES)
        self._before = [] if found else list(before)  # tokens whose messages are unknown
        self._messages: list[dict[str, str]] = json.loads(found) if found else []
        if system is not None and not found and not before:
            self._messages = [{"role": "system", "content": system}]

    def ask(self, text: str) -> list[int]:
        """Add a user's turn; return the token ids of the whole conversation up to the answer.

        Raises:
            ArgumentError: The template raises an error for the messages.
        """
        self._messages.append({"role": "user", "content": text})
        try:
            whole = self._continued() if self._before else self._template(self._messages, add_generation_prompt=True)
        except Exception as error:  # a template may raise any, for example if it allows no system prompt
            message = (str(error).splitlines() or [""])[0]
            raise ArgumentError(f"the model's chat template: {type(error).__name__}: {message}") from None
        return [*self._before, *self._tokenizer.encode(whole, add_special_tokens=False)]

    def ask_plainly(self, text: str, before: Sequence[int]) -> list[int]:
        """Add plain text after the tokens `before`, without a template; return all ids. The messages are dropped."""
        ids = self._tokenizer.encode(text, add_special_tokens=not before)
        if not ids:
            raise ArgumentError("prompt: no token, expected at least one")
        self._messages = []
        self._before = list(before)
        return [*before, *ids]

    def end_turn(self, answer: str | None) -> None:
        """Add the model's answer; ``None``: there was none, and the user's turn is removed."""
        if not self._messages:  # the turn was plain text
            return
        if answer is None:
            self._messages.pop()
        else:
            self._messages.append({"role": "assistant", "content": answer})

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata to save with the cache; empty where the messages are unknown."""
        return {} if self._before or not self._messages else {MESSAGES: json.dumps(self._messages)}

    def _continued(self) -> str:
        """The template's text without the parts before the first turn: bos, and the template's own system prompt."""
        system = [{"role": "system", "content": ""}]
        with suppress(Exception):  # the template allows no system prompt, or requires a user's turn
            first = self._template(system)
            both = self._template([*system, *self._messages], add_generation_prompt=True)
            if both.startswith(first):
                return str(both.removeprefix(first))
        whole = self._template(self._messages, add_generation_prompt=True)
        return str(whole.removeprefix(self._tokenizer.bos_token or ""))

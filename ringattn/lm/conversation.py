"""A chat's messages, and the token ids that the model's chat template makes of all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import ArgumentError
from .sharding.history import shared_length
from .sharding.sharded_cache import ShardedKVCache

MESSAGES = "messages"  # the key of a saved cache's metadata


class Conversation:
    """The messages of one chat.

    Args:
        tokenizer: mlx-lm's.
        system: The system prompt of a conversation that begins here.
        config: More variables for the chat template.
        metadata: Of the saved cache that the conversation goes on from.
        before: The token ids of that cache.
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
        self._before = [] if found else list(before)  # tokens whose messages nobody knows
        self._messages: list[dict[str, str]] = json.loads(found) if found else []
        if system is not None and not found and not before:
            self._messages = [{"role": "system", "content": system}]

    def ask(self, text: str) -> list[int]:
        """Add a user's turn; the token ids of all that is to be read before the answer.

        Raises:
            ArgumentError: The template refuses the messages.
        """
        self._messages.append({"role": "user", "content": text})
        try:
            whole = self._continued() if self._before else self._template(self._messages, add_generation_prompt=True)
        except Exception as error:  # whatever a template says, such as that it knows no system prompt
            told = (str(error).splitlines() or [""])[0]
            raise ArgumentError(f"the model's chat template: {type(error).__name__}: {told}") from None
        return [*self._before, *self._tokenizer.encode(whole, add_special_tokens=False)]

    def ask_plainly(self, text: str, before: Sequence[int]) -> list[int]:
        """As `ask`, without a template: the text as it is, after the tokens `before`. Its messages are nobody's."""
        ids = self._tokenizer.encode(text, add_special_tokens=not before)
        if not ids:
            raise ArgumentError("prompt: no token, expected at least one")
        self._messages = []
        self._before = list(before)
        return [*before, *ids]

    def end_turn(self, answer: str | None) -> None:
        """Add the model's answer; ``None``: it did not answer, and the user's turn is forgotten."""
        if not self._messages:  # plain text was asked
            return
        if answer is None:
            self._messages.pop()
        else:
            self._messages.append({"role": "assistant", "content": answer})

    @property
    def metadata(self) -> dict[str, str]:
        """What a saved cache says of the conversation."""
        return {} if self._before or not self._messages else {MESSAGES: json.dumps(self._messages)}

    def _continued(self) -> str:
        """The template's text without what it puts before the first turn: bos, and a system prompt of its own."""
        system = [{"role": "system", "content": ""}]
        with suppress(Exception):  # a template that knows no system prompt, or wants a user
            first = self._template(system)
            both = self._template([*system, *self._messages], add_generation_prompt=True)
            if both.startswith(first):
                return str(both.removeprefix(first))
        whole = self._template(self._messages, add_generation_prompt=True)
        return str(whole.removeprefix(self._tokenizer.bos_token or ""))


def reusable(cache: Sequence[ShardedKVCache], ids: Sequence[int]) -> int:
    """How many first tokens of `ids`, all but the last at most, `cache` holds and can be trimmed to."""
    held = cache[0].tokens.reshape(-1).tolist()
    shared = max(0, min(shared_length(held, ids), len(ids) - 1))
    return shared if shared == len(held) or all(layer.is_trimmable() for layer in cache) else 0

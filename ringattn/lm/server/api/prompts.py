"""Prompts of requests as tokens."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...mlx_lm_compat import convert_chat, process_message_content
from .fields import RequestError
from .requests import Request


class Prompt(NamedTuple):
    """The tokens of a prompt, and the first state of mlx-lm's text state machine for the answer."""

    ids: list[int]
    state: str


class PromptBuilder:
    """Make prompts with the model's chat template and tokenizer.

    Args:
        tokenizer: mlx-lm's tokenizer.
        template: Arguments of the chat template; a request may change them.
        longest: The largest number of characters in a prompt, with those of the template.
    """

    def __init__(self, tokenizer: Any, template: Mapping[str, Any], longest: int):
        self._tokenizer = tokenizer
        self._template = template
        self._longest = longest
        self._tokenizing = threading.Lock()  # one long prompt at a time, to bound work and memory

    def build(self, request: Request) -> Prompt:
        """Make the prompt of a request.

        Raises:
            RequestError: The template or the tokenizer fails, or knows no tools, or the prompt is too long or has no
                token.
        """
        templated = request.kind == "chat" and self._tokenizer.has_chat_template
        if request.role_mapping and templated:
            raise RequestError(400, "role_mapping: the model has a chat template, expected none", "role_mapping")
        try:
            text = self._text(request, templated)
            if len(text) > self._longest:
                message = f"the prompt has {len(text)} characters, expected at most {self._longest}"
                raise RequestError(413, message, None, "context_length_exceeded")
            _check_unicode(text)
            with self._tokenizing:
                ids = self._tokenizer.encode(text, **({"add_special_tokens": False} if templated else {}))
        except RequestError:
            raise
        except Exception as error:  # a model's template or tokenizer may raise any
            raise RequestError(400, f"the prompt cannot be made: {type(error).__name__}: {error}") from None
        if not ids:
            raise RequestError(400, "prompt: no token, expected at least one", "prompt")
        return Prompt(list(ids), self._state(ids) if templated else "normal")

    def _text(self, request: Request, templated: bool) -> str:
        """The text of the prompt."""
        if request.kind == "text":
            return request.prompt
        process_message_content(request.messages)
        text = self._chat(request, templated, request.tools)
        if request.tools and text == self._chat(request, templated, None):
            message = "tools: the model's chat template knows no tools, expected none, or tool_choice 'none'"
            raise RequestError(400, message, "tools")
        return text

    def _chat(self, request: Request, templated: bool, tools: Any) -> str:
        """The text of a chat."""
        if not templated:
            return convert_chat(request.messages, request.role_mapping)
        options = {**self._template, **request.template, "tools": tools}
        template = self._tokenizer.apply_chat_template
        return str(template(request.messages, add_generation_prompt=True, tokenize=False, **options))

    def _state(self, ids: list[int]) -> str:
        """The state after the prompt: the template itself may begin the reasoning."""
        tokenizer = self._tokenizer
        if tokenizer.response_initial_state:
            return str(tokenizer.response_initial_state)
        if tokenizer.has_thinking and tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids):
            return "reasoning"
        return "normal"


def _check_unicode(text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RequestError(400, f"the prompt has {half}, half of a surrogate pair, expected Unicode text") from None

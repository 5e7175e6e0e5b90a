"""The parts of an answer: content, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...mlx_lm_compat import TextStateMachine, ToolCallFormatter, make_text_state_machine


@dataclass
class Delta:
    """The part of an answer that a piece of text adds; tool calls are in OpenAI's form."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


class AnswerParser:
    """Split the text of an answer, which comes in pieces, at the model's own markers.

    Only the markers are left out. Text that begins like a marker and is none becomes content, and so does a tool call
    that cannot be parsed, for example because it was cut short.

    Args:
        tokenizer: mlx-lm's tokenizer, which has the markers; ``None`` for a text without markers.
        state: The first state of mlx-lm's state machine.
        tools: The tools of the request.
        streaming: Whether tool calls are numbered, as in a stream.
    """

    def __init__(self, tokenizer: Any, state: str = "normal", tools: Any = None, streaming: bool = False):
        machine = TextStateMachine() if tokenizer is None else make_text_state_machine(tokenizer)
        self._state = machine.make_state(state)
        self._format = None if tokenizer is None else ToolCallFormatter(tokenizer.tool_parser, tools, streaming)
        self._call: str | None = None  # the text of an unfinished tool call
        self._called = False

    def push(self, text: str, finish_reason: str | None = None) -> tuple[Delta, str | None]:
        """Add `text`; return the part that it adds, and OpenAI's finish reason if the answer ends."""
        self._state, parts = TextStateMachine.split(self._state, text)
        if finish_reason is not None:
            self._state, held, state = TextStateMachine.flush(self._state)
            parts.append((state, held))
        delta = self._delta(parts)
        if finish_reason is None:
            return delta, None
        if self._call is not None:
            self._end_call(delta)
        return delta, "tool_calls" if finish_reason == "stop" and self._called else finish_reason

    def _delta(self, parts: Iterable[tuple[str, str]]) -> Delta:
        """Collect the texts of several states in one delta."""
        delta = Delta()
        for state, text in parts:
            if state == "tool":
                self._call = (self._call or "") + text
                continue
            if self._call is not None:
                self._end_call(delta)
            if state == "normal":
                delta.content += text
            elif state == "reasoning":
                delta.reasoning += text
        return delta

    def _end_call(self, delta: Delta) -> None:
        """Add the finished tool call to `delta`, or its text where it cannot be parsed."""
        text = self._call or ""
        self._call = None
        try:
            calls = self._format([text]) if self._format else []
        except Exception:  # a model's parser may raise any for text that is no call
            calls = []
        self._called = self._called or bool(calls)
        delta.tool_calls += calls
        delta.content += "" if calls else text

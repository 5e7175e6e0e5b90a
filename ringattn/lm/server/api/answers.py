"""The parts of an answer: content, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.server import ToolCallFormatter


@dataclass
class Delta:
    """What a piece of text adds to an answer; tool calls are in OpenAI's form."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


class AnswerParser:
    """Split the text of an answer, which comes in pieces, by the model's own markers.

    The markers are left out. No other text is lost: what begins like a marker and turns out to be none is content, and
    so is a tool call that cannot be parsed, because it was cut short for example.

    Args:
        tokenizer: mlx-lm's, which knows the markers; ``None`` for a text without any.
        state: The state of mlx-lm's machine that the answer begins in.
        tools: The request's.
        streaming: Whether tool calls are numbered, as in a stream.
    """

    def __init__(self, tokenizer: Any, state: str = "normal", tools: Any = None, streaming: bool = False):
        machine = TextStateMachine() if tokenizer is None else make_text_state_machine(tokenizer)
        self._state = machine.make_state(state)
        self._format = None if tokenizer is None else ToolCallFormatter(tokenizer.tool_parser, tools, streaming)
        self._call: str | None = None  # the text of a tool call that has begun
        self._called = False

    def push(self, text: str, finish_reason: str | None = None) -> tuple[Delta, str | None]:
        """What `text` adds, and OpenAI's reason to finish where `finish_reason` is one."""
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
        text, self._call = self._call or "", None
        try:
            calls = self._format([text]) if self._format else []
        except Exception:  # whatever a model's parser says to a call that is none
            calls = []
        self._called = self._called or bool(calls)
        delta.tool_calls += calls
        delta.content += "" if calls else text

"""ScoreRules for the fields of a request: each takes a field's name and value, and returns the value to use."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

Rule = Callable[[str, Any], Any]

LARGEST_WHOLE = 2**31 - 1
LARGEST_SEED = 2**64 - 1
LARGEST_REPETITION_PENALTY = 1e6  # a factor: "never again" is a fair wish
LARGEST_PENALTY = 100.0  # OpenAI's limit of logit_bias; float16 logits stay finite
GREEDY = 1e-6  # lower temperatures count as 0: dividing by them overflows float32
MOST_STOP_WORDS = 64
LONGEST_STOP_WORD = 1024  # characters
MOST_MESSAGES = 4096
MOST_TOOLS = 128  # OpenAI's limit
LONGEST_TEMPLATE_TEXT = 200  # characters of a text for the chat template

# Variables that published chat templates read. Others could replace the template or pad the prompt.
TEMPLATE_KEYS = {
    *("enable_thinking", "thinking", "thinking_mode", "thinking_budget", "low_effort", "add_nothink_token"),
    *("reasoning_effort", "reasoning_budget", "clear_thinking", "preserve_thinking", "drop_thinking"),
    *("keep_past_thinking", "truncate_history_thinking", "date_string", "model_identity"),
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 3


class RequestError(Exception):
    """The error for a request that is refused.

    Attributes:
        status: The HTTP status.
        param: The wrong field; ``None`` where the error is in no single field.
        code: OpenAI's error code, or one in its style.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def wrong(name: str, value: Any, expected: str) -> RequestError:
    """Make the error for a field; a long value is cut."""
    return RequestError(400, f"{name}: {_SHORT.repr(value)}, expected {expected}", name)


def number(low: float, high: float) -> Rule:
    """Make a rule for a finite number in a range."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def whole(low: int, high: int) -> Rule:
    """Make a rule for a whole number in a range."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def only(*allowed: Any, why: str = "") -> Rule:
    """Make a rule for one of a few values; `why` is the reason in the error."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise wrong(name, value, " or ".join(map(repr, allowed)) + why)
        return value

    return check


def refused(why: str) -> Rule:
    """Make a rule that refuses every value."""

    def check(name: str, value: Any) -> Any:
        raise wrong(name, value, f"none: {why}")

    return check


def flag(name: str, value: Any) -> bool:
    """Check true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    """Check a text."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def table(name: str, value: Any) -> dict[str, Any]:
    """Check a JSON object."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def objects(most: int) -> Rule:
    """Make a rule for a list of JSON objects."""

    def check(name: str, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise wrong(name, value, "a list of objects")
        if len(value) > most:
            raise RequestError(400, f"{name}: {len(value)} of them, expected at most {most}", name)
        return value

    return check


def temperature(name: str, value: Any) -> float:
    """Check a sampling temperature; the smallest count as 0."""
    found: float = number(0, 100)(name, value)
    return found if found >= GREEDY else 0.0


def chat_logprobs(name: str, value: Any) -> int | None:
    """Check a chat's ``logprobs``: 0 likeliest tokens with each token, or ``None`` for no log-probabilities."""
    return 0 if flag(name, value) else None


def text_logprobs(name: str, value: Any) -> int | None:
    """Check a text's ``logprobs``: a number of likeliest tokens as in OpenAI's older endpoint, or mlx-lm's flag."""
    return chat_logprobs(name, value) if isinstance(value, bool) else top_logprobs(name, value)


def top_logprobs(name: str, value: Any) -> int:
    """Check a number of likeliest tokens; mlx-lm's -1 is 0."""
    found: int = whole(-1, 20)(name, value)
    return max(found, 0)


def stop_words(name: str, value: Any) -> tuple[str, ...]:
    """Check stop words; return a tuple."""
    words = [value] if isinstance(value, str) and value else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise wrong(name, value, "a text or a list of texts that are not empty")
    if len(words) > MOST_STOP_WORDS or any(len(word) > LONGEST_STOP_WORD for word in words):
        raise wrong(name, value, f"at most {MOST_STOP_WORDS} texts of at most {LONGEST_STOP_WORD} characters")
    return tuple(words)


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """Check numbers that are added to the logits of tokens."""
    rule = number(-LARGEST_PENALTY, LARGEST_PENALTY)
    found = {}
    for token, bias in table(name, value).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise RequestError(400, f"{name}: token {_SHORT.repr(token)}, expected the number of a token", name)
        try:
            found[int(token)] = rule(name, bias)
        except RequestError as error:
            raise RequestError(400, f"{error} for token {token}", name) from None
    return found


def stream_options(name: str, value: Any) -> dict[str, bool]:
    """Check OpenAI's options of a stream."""
    known = ("include_usage", "include_obfuscation")
    for key, one in table(name, value).items():
        if key not in known:
            raise wrong(name, value, f"only {' and '.join(known)}")
        if one is not None:
            flag(f"{name}.{key}", one)
    return {key: bool(one) for key, one in value.items()}


def response_format(name: str, value: Any) -> None:
    """Check that the format is plain text: the server cannot restrict answers to a grammar."""
    if table(name, value).get("type") != "text" or len(value) > 1:
        raise wrong(name, value, '{"type": "text"}: this server cannot restrict answers to a format')


def tool_choice(name: str, value: Any) -> str:
    """Check whether the model may call tools; the server cannot force it to."""
    if value not in ("auto", "none"):
        raise wrong(name, value, "'auto' or 'none': this server cannot force a model to call a tool")
    return str(value)


def short_text(name: str, value: Any) -> str:
    """Check a text for a chat template."""
    if len(text(name, value)) > LONGEST_TEMPLATE_TEXT:
        raise wrong(name, value, f"at most {LONGEST_TEMPLATE_TEXT} characters")
    return str(value)


def template_options(name: str, value: Any) -> dict[str, Any]:
    """Check arguments of the chat template: known names with short scalar values."""
    found = {key: one for key, one in table(name, value).items() if one is not None}
    for key, one in found.items():
        if key not in TEMPLATE_KEYS:
            raise wrong(name, key, f"one of {', '.join(sorted(TEMPLATE_KEYS))}")
        if not isinstance(one, bool | int | str) or (not isinstance(one, str) and abs(one) > LARGEST_WHOLE):
            raise wrong(f"{name}.{key}", one, "a text, a whole number, true or false")
        if isinstance(one, str):
            short_text(f"{name}.{key}", one)
    return found


def role_mapping(name: str, value: Any) -> dict[str, str]:
    """Check mlx-lm's texts before each role's messages, for a model without a chat template."""
    for key, one in table(name, value).items():
        short_text(f"{name}.{key}", one)
    return dict(value)


def tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Check OpenAI's list of functions."""
    for i, tool in enumerate(objects(MOST_TOOLS)(name, value)):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise wrong(f"{name}[{i}]", tool, "an object of type 'function' with a function")
        text(f"{name}[{i}].function.name", function.get("name"))
        table(f"{name}[{i}].function.parameters", function.get("parameters") or {})
    return list(value)


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Check a conversation of texts. Images are refused, since mlx-lm would fetch them from any address."""
    if not objects(MOST_MESSAGES)(name, value):
        raise wrong(name, value, "at least one message")
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        text(f"{where}.role", message.get("role"))
        _content(f"{where}.content", message.get("content"))
        _tool_calls(f"{where}.tool_calls", message.get("tool_calls"))
    return list(value)


def _content(name: str, value: Any) -> None:
    """Check the content of a message."""
    if not (value is None or isinstance(value, str | list)):
        raise wrong(name, value, "a text or a list of parts")
    parts: Sequence[Any] = value if isinstance(value, list) else ()
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise wrong(name, part, "parts of type 'text'")


def _tool_calls(name: str, value: Any) -> None:
    """Check the tool calls of a message."""
    for call in objects(MOST_TOOLS)(name, value or []):
        function = table(f"{name}.function", call.get("function"))
        text(f"{name}.function.name", function.get("name"))
        if not isinstance(function.get("arguments", ""), str | dict):
            raise wrong(f"{name}.function.arguments", function["arguments"], "JSON as a text, or an object")

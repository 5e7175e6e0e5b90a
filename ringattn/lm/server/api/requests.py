"""JSON bodies of requests, checked before a request goes to the other ranks. A null is an absent field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from . import fields
from .fields import RequestError, Rule

DEFAULT_MODEL = "default_model"  # mlx-lm's name for the model from the command line

SAMPLING: dict[str, Rule] = {
    "temperature": fields.temperature,
    "top_p": fields.number(0, 1),
    "top_k": fields.whole(0, fields.LARGEST_WHOLE),
    "min_p": fields.number(0, 1),
    "xtc_probability": fields.number(0, 1),
    "xtc_threshold": fields.number(0, 0.5),
}
PROCESSORS: dict[str, Rule] = {
    "logit_bias": fields.logit_bias,
    "repetition_penalty": fields.number(0, fields.LARGEST_REPETITION_PENALTY),
    "repetition_context_size": fields.whole(1, fields.LARGEST_WHOLE),
    "presence_penalty": fields.number(-fields.LARGEST_PENALTY, fields.LARGEST_PENALTY),
    "presence_context_size": fields.whole(1, fields.LARGEST_WHOLE),
    "frequency_penalty": fields.number(-fields.LARGEST_PENALTY, fields.LARGEST_PENALTY),
    "frequency_context_size": fields.whole(1, fields.LARGEST_WHOLE),
}
BOTH: dict[str, Rule] = {
    **SAMPLING,
    **PROCESSORS,
    "model": fields.text,
    "stream": fields.flag,
    "stream_options": fields.stream_options,
    "max_tokens": fields.whole(1, fields.LARGEST_WHOLE),
    "stop": fields.stop_words,
    "seed": fields.whole(0, fields.LARGEST_SEED),
    "top_logprobs": fields.top_logprobs,
    "n": fields.only(1, why=": a request has one answer"),
    "response_format": fields.response_format,
    "adapters": fields.refused("the server has the one model of its command line"),
    "draft_model": fields.only(DEFAULT_MODEL, why=": this server has no draft model"),
    "num_draft_tokens": fields.whole(0, fields.LARGEST_WHOLE),
}
CHAT: dict[str, Rule] = {
    **BOTH,
    "messages": fields.messages,
    "max_completion_tokens": fields.whole(1, fields.LARGEST_WHOLE),
    "logprobs": fields.chat_logprobs,
    "tools": fields.tools,
    "tool_choice": fields.tool_choice,
    "parallel_tool_calls": fields.only(True, why=": the model decides how many tools it calls"),
    "chat_template_kwargs": fields.template_options,
    "reasoning_effort": fields.short_text,
    "role_mapping": fields.role_mapping,
    "modalities": fields.only(["text"]),
    "verbosity": fields.only("medium"),
}
TEXT: dict[str, Rule] = {
    **BOTH,
    "prompt": fields.text,
    "logprobs": fields.text_logprobs,
    "best_of": fields.only(1),
    "echo": fields.only(False),
    "suffix": fields.only(""),
}
RULES = {"chat": CHAT, "text": TEXT}
HARMLESS = {  # fields that do not change the answer
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prediction"),
}


@dataclass(frozen=True)
class Served:
    """The model and the defaults that requests are checked against.

    Attributes:
        names: The names of the model, first the one on the command line.
        vocabulary: The number of its tokens.
        defaults: ``max_tokens`` and sampling options; a request may change them.
    """

    names: tuple[str, ...]
    vocabulary: int
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        kind: ``"chat"`` or ``"text"``.
        messages, tools, role_mapping, template: The conversation of a chat, and arguments of its template.
        prompt: The beginning of a text.
        gives_max_tokens: Whether `max_tokens` is the client's, not the server's default.
        logprobs: The number of likeliest tokens to return for each token; ``None``: no log-probabilities at all.
        sampling: Keywords of mlx-lm's `make_sampler`, with ``temperature`` in place of ``temp``.
        processors: Keywords of mlx-lm's `make_logits_processors`.
    """

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    role_mapping: dict[str, str] | None
    template: dict[str, Any]
    prompt: str
    stream: bool
    include_usage: bool
    max_tokens: int
    gives_max_tokens: bool
    stop: tuple[str, ...]
    seed: int | None
    logprobs: int | None
    sampling: dict[str, Any]
    processors: dict[str, Any]


def read_json(body: bytes) -> Any:
    """Parse a JSON text by stricter rules than Python's: only finite numbers, only UTF-8."""
    try:
        return json.loads(body.decode(), parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"request body: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RequestError(400, f"request body: not JSON ({error})") from None
    except RecursionError:
        raise RequestError(400, "request body: nested too deep, expected JSON of a few levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RequestError(400, f"request body: {error}") from None


def read_request(kind: str, body: Any, served: Served) -> Request:
    """Check the JSON value `body` of a request for a ``"chat"`` or a ``"text"``.

    Raises:
        RequestError: A field is wrong or not supported; the message names it.
    """
    if not isinstance(body, dict):
        raise RequestError(400, f"request body: {type(body).__name__}, expected a JSON object")
    values = _checked(RULES[kind], body)
    _check_model(values.get("model", DEFAULT_MODEL), served)
    needed = "messages" if kind == "chat" else "prompt"
    if needed not in values:
        raise RequestError(400, f"{needed}: missing", needed, "missing_required_parameter")
    gives_max_tokens = not values.keys().isdisjoint(("max_tokens", "max_completion_tokens"))
    values = {**served.defaults, **values}
    _check_tokens(values, served.vocabulary)
    return _build(kind, values, gives_max_tokens)


def _checked(rules: Mapping[str, Rule], body: Mapping[str, Any]) -> dict[str, Any]:
    """Check each field that is present by its rule."""
    values = {}
    for name, value in body.items():
        if value is None or name in HARMLESS:
            continue
        if name not in rules:
            short = name if len(name) <= 60 else name[:60] + "..."
            raise RequestError(400, f"{short}: not supported by this server", short, "unsupported_parameter")
        values[name] = rules[name](name, value)
    return values


def _check_model(name: str, served: Served) -> None:
    if name not in (*served.names, DEFAULT_MODEL):
        message = f"model: {name[:200]!r} is not served here, expected {served.names[0]!r}"
        raise RequestError(404, message, "model", "model_not_found")


def _check_tokens(values: Mapping[str, Any], vocabulary: int) -> None:
    """Check the fields that the size of the vocabulary limits."""
    if values.get("top_k", 0) >= vocabulary:
        raise fields.wrong("top_k", values["top_k"], f"less than {vocabulary}")
    for name in ("logprobs", "top_logprobs"):
        if int(values.get(name) or 0) > vocabulary:
            raise fields.wrong(name, values[name], f"at most {vocabulary}")
    unknown = [token for token in values.get("logit_bias", ()) if token >= vocabulary]
    if unknown:
        raise RequestError(400, f"logit_bias: token {unknown[0]}, expected 0 to {vocabulary - 1}", "logit_bias")


def _build(kind: str, values: Mapping[str, Any], gives_max_tokens: bool) -> Request:
    template = dict(values.get("chat_template_kwargs", {}))
    if "reasoning_effort" in values:
        template["reasoning_effort"] = values["reasoning_effort"]
    return Request(
        kind=kind,
        messages=values.get("messages", []),
        tools=(values.get("tools") or None) if values.get("tool_choice") != "none" else None,
        role_mapping=values.get("role_mapping"),
        template=template,
        prompt=values.get("prompt", ""),
        stream=values.get("stream", False),
        include_usage=values.get("stream_options", {}).get("include_usage", False),
        max_tokens=values.get("max_completion_tokens", values["max_tokens"]),
        gives_max_tokens=gives_max_tokens,
        stop=values.get("stop", ()),
        seed=values.get("seed"),
        logprobs=_logprobs(values),
        sampling={name: values[name] for name in SAMPLING if name in values},
        processors={name: values[name] for name in PROCESSORS if name in values},
    )


def _logprobs(values: Mapping[str, Any]) -> int | None:
    """The number of likeliest tokens to return for each token; ``None``: no log-probabilities at all."""
    asked = values.get("logprobs")
    top = values.get("top_logprobs", 0)
    return None if asked is None and not top else max(asked or 0, top)


def _no_number(text: str) -> None:
    """Refuse NaN and Infinity, which Python's parser accepts."""
    raise RequestError(400, f"request body: {text}, which is not JSON, expected finite numbers")


def _finite(text: str) -> float:
    """Parse a number; refuse one that overflows."""
    number = float(text)
    if not isfinite(number):
        raise RequestError(400, f"request body: {text[:32]}, expected finite numbers")
    return number

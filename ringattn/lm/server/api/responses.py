"""JSON of answers and errors, in the form of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..engine import AnswerPiece
from .answers import Delta
from .fields import RequestError

LEAST_LOGPROB = -9999.0  # OpenAI's for a token that is very unlikely; JSON has no infinity


def error_object(error: RequestError) -> dict[str, Any]:
    """The JSON of an error, in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


class Responses:
    """Build the responses to one request.

    Args:
        chat: Whether the request is for a chat; otherwise it is for a text.
        stream: Whether the answer is sent in chunks.
        include_usage: Whether the chunks have a field for the usage.
        model: The name of the model.
        fingerprint: The fingerprint of this system.
        tokenizer: The tokenizer that decodes single tokens.
    """

    def __init__(self, *, chat: bool, stream: bool, include_usage: bool, model: str, fingerprint: str, tokenizer: Any):
        kind = "chat.completion" if chat else "text_completion"
        self._chat = chat
        self._usage_field = {"usage": None} if stream and include_usage else {}
        self._tokenizer = tokenizer
        self._offset = 0  # characters of the tokens so far
        self._first = True
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4()}",
            "object": kind + ".chunk" if chat and stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(
        self, delta: Delta, finish_reason: str, pieces: Sequence[AnswerPiece], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Build a whole answer. `pieces` are those with log-probabilities in it."""
        message = {"role": "assistant", "content": None if delta.tool_calls and not delta.content else delta.content}
        choice = {"message": {**message, **_extras(delta)}} if self._chat else {"text": delta.content}
        return {**self._common, "choices": [self._choice(choice, finish_reason, pieces)], "usage": usage}

    def chunk(self, delta: Delta, finish_reason: str | None, pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
        """Build one chunk of an answer. `pieces` are those with log-probabilities in it."""
        choice: dict[str, Any] = {"text": delta.content}
        if self._chat:
            role = {"role": "assistant", "content": delta.content} if self._first else {}
            content = {"content": delta.content} if delta.content else {}
            choice = {"delta": {**role, **content, **_extras(delta)}}
        self._first = False
        return {**self._common, "choices": [self._choice(choice, finish_reason, pieces)], **self._usage_field}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Build the last chunk of a stream with the usage."""
        return {**self._common, "choices": [], "usage": usage}

    def _choice(
        self, content: dict[str, Any], finish_reason: str | None, pieces: Sequence[AnswerPiece]
    ) -> dict[str, Any]:
        logprobs = self._logprobs(pieces) if pieces else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
        """Log-probabilities in the form for chats; for a text also in the older form of its endpoint."""
        content = [
            {
                **self._token(piece.token, piece.logprob or 0.0),
                "top_logprobs": [self._token(*one) for one in piece.top],
            }
            for piece in pieces
        ]
        if self._chat:
            return {"content": content, "refusal": None}
        offsets = []
        for entry in content:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "content": content,
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in content],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """The JSON of a token; without bytes where it is a part of a character."""
        text = self._tokenizer.decode([token])
        known = None if "\ufffd" in text else list(text.encode())
        logprob = logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # also for NaN
        return {"id": token, "token": text, "logprob": logprob, "bytes": known}


def usage_object(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """The JSON of a request's numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _extras(delta: Delta) -> dict[str, Any]:
    """The fields of a message beside its content."""
    reasoning = {"reasoning": delta.reasoning} if delta.reasoning else {}
    return {**reasoning, **({"tool_calls": delta.tool_calls} if delta.tool_calls else {})}

"""Prompts: their token ids, checked on rank 0 before they go to the other ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ArgumentError, ContextWarning
from .limits import context_limit, vocabulary

Prompt = str | mx.array | np.ndarray | Sequence[int]


def prompt_ids(tokenizer: Any, prompt: Prompt, model: nn.Module) -> np.ndarray:
    """The ids of a prompt ``[tokens]``, int32.

    Raises:
        ArgumentError: The prompt is not Unicode text, is empty, or has a number that is no token id of the model.
    """
    ids = _encoded(tokenizer, prompt) if isinstance(prompt, str) else _numbers(prompt)
    if not ids.size:
        raise ArgumentError("prompt: no token, expected at least one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ArgumentError(f"prompt: {ids.dtype} of shape {ids.shape}, expected text or one row of integer token ids")
    count = vocabulary(model)
    wrong = ids[(ids < 0) | (ids >= count)]
    if wrong.size:
        raise ArgumentError(f"prompt: token {wrong[0]}, expected 0 to {count - 1}")
    return ids.astype(np.int32)


def warn_of_length(model: nn.Module, before: int, tokens: int) -> None:
    """Warn if `tokens` new ones after `before` in the cache pass the model's longest context, which those did not."""
    limit = context_limit(model)
    if limit is not None and before <= limit < before + tokens:
        text = f"prompt: {before + tokens:,} tokens with those in the cache, expected at most {limit:,}"
        remedy = "the model was not made for more, and its answer is likely to be wrong. Shorten the prompt."
        warnings.warn(f"{text}: {remedy}", ContextWarning, stacklevel=3)


def _encoded(tokenizer: Any, text: str) -> np.ndarray:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ArgumentError(f"prompt: {character!r} at index {error.start}, expected Unicode text") from None
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return np.array(tokenizer.encode(text, add_special_tokens=special))


def _numbers(prompt: Any) -> np.ndarray:
    try:
        return np.array(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # ragged, or nothing that NumPy knows
        raise ArgumentError(f"prompt: {type(prompt).__name__}, expected text or one row of token ids") from None

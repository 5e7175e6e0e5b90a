"""Results of plain mlx-lm, computed once for all ranks and runs, and the difference from them that is allowed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from stored import stored

from ringattn.lm.prompt_cache.fingerprint import fingerprint

ULPS = 32  # of the largest logit, float32


def logits(model: nn.Module, ids: mx.array, steps: tuple[int, ...]) -> mx.array:
    """The logits of plain mlx-lm for `ids`, read in pieces of `steps` tokens."""

    def read(_: Any) -> Any:
        cache = make_prompt_cache(model)
        starts = np.cumsum([0, *steps])
        found = mx.concatenate([model(ids[:, a:b], cache=cache) for a, b in zip(starts, starts[1:])], axis=1)
        return str(found.dtype).rpartition(".")[2], np.array(found.astype(mx.float64))

    dtype, found = stored("logits", read)((fingerprint(model), ids, steps))
    return mx.array(found, mx.float64).astype(getattr(mx, dtype))


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The tokens of plain mlx-lm after `prompt`."""

    def answer(_: Any) -> list[int]:
        return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]

    found: list[int] = stored("greedy", answer)((fingerprint(model), prompt, count))
    return found


def tolerance(model: nn.Module, ids: mx.array, expected: mx.array, *others: tuple[int, ...]) -> float:
    """The difference that is allowed: 32 ulps, or twice that of mlx-lm itself when it reads `ids` in other pieces."""
    own = max((mx.abs(logits(model, ids, steps) - expected).max().item() for steps in others), default=0.0)
    return max(ULPS * 2**-23 * mx.abs(expected).max().item(), 2 * own)

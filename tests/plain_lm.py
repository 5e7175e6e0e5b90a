"""Results of plain mlx-lm, computed once for all ranks and runs, and the difference from them that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
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


class Tolerance:
    """The difference that is allowed: 32 ulps, or twice that of mlx-lm itself when it reads `ids` in other pieces.

    Args:
        build: Makes the model. mlx-lm reads again only where a difference is above 32 ulps.
        ids: The tokens.
        expected: mlx-lm's logits for them.
        others: Other pieces to read them in.
    """

    def __init__(self, build: Callable[[], nn.Module], ids: mx.array, expected: mx.array, *others: tuple[int, ...]):
        self._ulps = ULPS * 2**-23 * mx.abs(expected).max().item()
        self._build = build
        self._ids = ids
        self._expected = expected
        self._others = others

    def check(self, found: mx.array, expected: mx.array, what: object = "") -> None:
        """Assert that `found` is near enough to `expected`, a part of all logits."""
        assert found.shape == expected.shape, what
        error = mx.abs(found - expected).max().item() if found.size else 0.0
        assert error < self._ulps or error < self._of_mlx_lm, (what, error, self._ulps)

    @cached_property
    def _of_mlx_lm(self) -> float:
        model = self._build()
        found = (logits(model, self._ids, steps) for steps in self._others)
        return 2 * max((mx.abs(x - self._expected).max().item() for x in found), default=0.0)

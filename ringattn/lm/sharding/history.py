"""The ids of the tokens in a cache: penalties count them, and a new prompt is compared with them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

PARTS = 256  # calls whose ids are kept in separate arrays


class TokenHistory:
    """The ids of all tokens that went through a model into one cache; the same on every rank.

    Ids may be unevaluated, so that a call of the model does not wait for them.
    """

    def __init__(self, ids: mx.array | None = None):
        self._parts: list[mx.array] = []
        self._length = 0
        if ids is not None:
            self.write(0, ids)

    def write(self, start: int, ids: mx.array) -> None:
        """Put `ids` ``[batch, tokens]`` at the positions from `start` on; drop all ids that were there or later."""
        if start < self._length:
            self._parts = [mx.array(self.read(start))]
        self._parts.append(ids.astype(mx.int32))
        self._length = start + ids.shape[1]
        if len(self._parts) > PARTS:
            self._parts = [mx.array(self.read(self._length))]

    def read(self, stop: int) -> np.ndarray:
        """The ids of the tokens before `stop`, ``[batch, tokens]``, int32."""
        if not self._parts:
            return np.zeros((1, 0), np.int32)
        return np.concatenate([np.array(part) for part in self._parts], axis=1)[:, :stop]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

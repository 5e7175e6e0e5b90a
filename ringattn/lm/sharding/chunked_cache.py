"""Layers whose tokens attend within chunks of positions (Llama 4): a token sees the earlier tokens of its own chunk."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...core.intervals import positions
from .partition import Step
from .sharded_cache import ShardedKVCache


class Chunk(int):
    """The tokens of a chunk, in the place of a layer's window."""


class ShardedChunkedCache(ShardedKVCache):
    """Cache of one layer with chunks. mlx-lm calls it as it calls its own `ChunkedKVCache`.

    Attributes:
        start_position: The first column of the mask that the model makes. That mask is not used.
    """

    start_position = 0

    @property
    def form(self) -> str:
        """The tokens of a chunk."""
        return f"keys and values, chunks of {self.window}"

    def maybe_trim_front(self) -> None:
        """Do nothing: tokens of earlier chunks are dropped where new ones arrive."""

    def constraints(self, mask: Any) -> dict[str, Any]:
        """The chunks as segments, by positions. `mask` says the same, with columns that no rank has."""
        assert self.step is not None and isinstance(self.window, Chunk) and self.keys is not None
        step, rank = self.step, self.ring.rank
        q_pos = positions(step.new.spans[rank]) if step.shared else np.arange(step.new.start, step.new.stop)
        q_ids, k_ids = (
            mx.broadcast_to(mx.array(pos // self.window, mx.int32), (self.keys.shape[0], len(pos)))
            for pos in (q_pos, positions(self.layout.spans[rank]))
        )
        return {"segments": q_ids if step.shared and self.layout == step.new else (q_ids, k_ids)}

    def _first_wanted(self, step: Step) -> int:
        assert self.window is not None
        return step.new.start // self.window * self.window

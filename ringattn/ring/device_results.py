"""Accumulators of results that stay on the GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..core.intervals import Spans, length
from ..transport.interface import Links
from .accumulators import Accumulator, Arrays, shared_tokens
from .blocks import Block
from .device_slots import packed


@dataclass(frozen=True)
class DeviceAccumulator(Accumulator):
    """Operations on results, by MLX.

    Attributes:
        links: The links that results travel on.
    """

    links: Links

    def block(self, arrays: Arrays, spans: Spans) -> Block:
        return Block(tuple(arrays), (2,) * len(arrays), spans)

    def expand(self, block: Block | None, spans: Spans) -> Block:
        if block is not None and block.spans == spans:
            return block
        whole = self.block(self.zeros(length(spans)), spans)
        return whole if block is None else self._with(whole, block, lambda _, part: part)

    def add(self, into: Block, part: Block) -> Block:
        if into.spans == part.spans:
            return self.block(self.merge(into.arrays, part.arrays), into.spans)
        return self._with(into, part, self.merge)

    def _with(self, whole: Block, part: Block, merge: Callable[[Arrays, Arrays], Sequence[mx.array]]) -> Block:
        """Replace the tokens of `part` in `whole` by what `merge` makes of both."""
        arrays = list(whole.arrays)
        for here, there in shared_tokens(part.spans, whole.spans, length(part.spans)):
            merged = merge([x[here] for x in arrays], [x[there] for x in part.arrays])
            for x, new in zip(arrays, merged):
                x[here] = new
        return self.block(arrays, whole.spans)

    def sendable(self, total: Block, spans: Spans) -> Block:
        return packed(total, spans, self.links)


def accumulator_for(links: Links | None) -> Callable[..., Accumulator]:
    """Return what makes the accumulator of results that travel through the host, or over `links`."""
    return Accumulator if links is None else lambda zeros, merge: DeviceAccumulator(zeros, merge, links)

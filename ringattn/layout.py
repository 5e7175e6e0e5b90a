"""Layouts: the tokens of a sequence that each rank holds."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np

from .core.intervals import Span, Spans, in_proportion, length, positions, tokens_at, union
from .core.validation import check_int, format_value
from .errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from .transport.base import Ring

SHOWN = 8  # ranks, and spans for each rank, in a layout's repr
SUMMARISED = 3  # spans of rank 0 in a layout's summary

Array = TypeVar("Array", mx.array, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """Positions of a sequence that each rank holds, as ascending spans ``(start, stop)`` in local order.

    A layout covers every position from `start` to `stop` exactly once. It is immutable and hashable. Two layouts that
    give the same tokens to the same ranks are equal: empty spans are dropped, adjacent ones joined.

        contiguous   0 0 0 0 1 1 1 1      zigzag   0 0 1 1 1 1 0 0      cyclic   0 0 1 1 0 0 1 1

    Args:
        spans: The spans of each rank. A rank may have none.
        start: The first position. Needed only where no rank holds a token (default 0).

    Raises:
        ArgumentError: If spans descend, overlap, leave a gap, or do not begin at `start`.
    """

    spans: tuple[Spans, ...]
    start: int = None  # type: ignore[assignment]  # derived from the spans when not given

    def __post_init__(self) -> None:
        spans = tuple(_checked_spans(rank, given) for rank, given in enumerate(_sequence("spans", self.spans)))
        if not spans:
            raise ArgumentError("spans: no rank at all, expected the spans of at least one rank")
        held = sorted(span for rank_spans in spans for span in rank_spans)
        first = held[0][0] if held else 0
        start = first if self.start is None else check_int("start", self.start)
        if held and start != first:
            raise ArgumentError(f"start: {start}, expected {first}, where the first span starts")
        for (_, stop), (next_start, next_stop) in zip(held, held[1:]):
            if next_start != stop:
                what = "overlap" if next_start < stop else "leave a gap"
                raise ArgumentError(
                    f"spans: (..., {stop}) and ({next_start}, {next_stop}) {what}, expected every position exactly once"
                )
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "start", start)

    @classmethod
    def contiguous(cls, n: int, size: int, *, start: int = 0) -> Layout:
        """Divide `n` tokens over `size` ranks, one span each, as equal as possible; the first ranks get longer ones."""
        return cls(tuple((span,) for span in _cut(n, (1.0,) * _checked_size(size), start)), start)

    @classmethod
    def zigzag(cls, n: int, size: int, *, start: int = 0) -> Layout:
        """Divide `n` tokens into ``2 * size`` chunks. Rank ``r`` holds chunks ``r`` and ``2 * size - 1 - r``.

        Every rank then has the same causal work at every hop. Use it for whole causal sequences.
        """
        return cls.weighted(n, (1,) * _checked_size(size), start=start)

    @classmethod
    def cyclic(cls, n: int, size: int, chunk: int, *, start: int = 0) -> Layout:
        """Divide `n` tokens into chunks of `chunk`, assigned to the ranks in turn, as in chunked prefill."""
        n = check_int("n", n, 0)
        start = check_int("start", start)
        size = _checked_size(size)
        chunk = check_int("chunk", chunk, 1)
        cuts = [(a, min(a + chunk, start + n)) for a in range(start, start + n, chunk)]
        return cls(tuple(tuple(cuts[rank::size]) for rank in range(size)), start)

    @classmethod
    def weighted(cls, n: int, weights: Sequence[float], *, start: int = 0) -> Layout:
        """Divide `n` tokens into mirrored pairs of spans, like zigzag, with lengths in proportion to `weights`.

        A pair of spans of length l at a and at N - a - l has causal work l(a + l/2) + l(N - a - l/2) = lN. So tokens,
        memory, linear layers and causal attention all scale with the weight. Use it where machines are unequal.
        """
        shares = _checked_weights(weights)
        chunks = _cut(n, [*shares, *reversed(shares)], start)
        return cls(tuple((chunks[rank], chunks[-1 - rank]) for rank in range(len(shares))), start)

    def __repr__(self) -> str:
        """Show spans and start. Long lists are cut off: a cache in chunks has thousands of spans."""
        return f"Layout(spans={_short(self.spans)}, start={self.start})"

    def __hash__(self) -> int:
        return self._hash  # cached: a cache in chunks has thousands of spans, and each call looks up its schedule

    @cached_property
    def _hash(self) -> int:
        return hash((self.start, self.spans))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.spans)

    @cached_property
    def length(self) -> int:
        """The number of tokens of all ranks."""
        return sum(self._lengths)

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(map(length, self.spans))

    @cached_property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.length

    @cached_property
    def summary(self) -> str:
        """Start, stop, what rank 0 has and a short hash of the spans: equal for equal layouts alone, on any machine."""
        spans = hashlib.blake2b(repr(self.spans).encode(), digest_size=8).hexdigest()
        first = ", ".join(f"{start}..{stop}" for start, stop in self.spans[0][:SUMMARISED]) or "none"
        more = ", ..." if len(self.spans[0]) > SUMMARISED else ""
        return f"{self.start}..{self.stop} on {self.size} ranks; rank 0 has {first}{more} ({spans})"

    def local_length(self, rank: int) -> int:
        """Count the tokens of `rank`."""
        return self._lengths[_checked_rank(rank, self.size)]

    def positions(self, rank: int) -> np.ndarray:
        """Return the positions of the tokens of `rank`, in local order: ascending int32 ``[local_length]``."""
        spans = self.spans[_checked_rank(rank, self.size)]
        return positions(spans)

    def extend(self, other: Layout) -> Layout:
        """Append `other`, which starts at the stop of this layout and has as many ranks."""
        if not isinstance(other, Layout):
            raise ArgumentTypeError(f"other: {format_value(other)}, expected a Layout")
        if other.size != self.size:
            raise ArgumentError(f"other: a layout of {other.size} ranks, expected {self.size}")
        if other.start != self.stop:
            raise ArgumentError(f"other: starts at {other.start}, expected {self.stop}, where this layout stops")
        layout = object.__new__(Layout)  # without the checks of thousands of spans: it is called for each new token
        object.__setattr__(layout, "spans", tuple(map(_joined, self.spans, other.spans)))
        object.__setattr__(layout, "start", self.start)
        return layout

    def shard(self, x: Array, rank: int, axis: int = 2) -> Array:
        """Cut the tokens of `rank` out of the whole mx or NumPy array `x`, whose token axis is `axis`."""
        axis = _checked_axis("x", x, axis, self.length)
        spans = self.spans[_checked_rank(rank, self.size)] or ((self.start, self.start),)
        pieces: list[Any] = [x[tokens_at(axis, start - self.start, stop - self.start)] for start, stop in spans]
        return _concatenate(pieces, axis)

    def unshard(self, parts: Sequence[Array], axis: int = 2) -> Array:
        """Join all ranks' `parts`, given in rank order, to the whole sequence. The inverse of `shard`."""
        parts = list(_sequence("parts", parts))
        if len(parts) != self.size:
            raise ArgumentError(f"parts: {len(parts)} arrays, expected {self.size}, one a rank")
        pieces: list[tuple[int, Any]] = []
        for rank, part in enumerate(parts):
            axis = _checked_axis(f"parts[{rank}]", part, axis, self.local_length(rank))
            before = 0
            for start, stop in self.spans[rank]:
                pieces.append((start, part[tokens_at(axis, before, before + stop - start)]))
                before += stop - start
        pieces.sort(key=lambda piece: piece[0])
        return _concatenate([piece for _, piece in pieces] or parts[:1], axis)

    def gather(self, x: mx.array, ring: Ring, axis: int = 2) -> mx.array:
        """Give every rank the whole sequence, from each rank's part `x`. Collective. Needs memory for the whole."""
        from .ring.gather import gather

        return gather(self, x, ring, axis)


def _joined(first: Spans, second: Spans) -> Spans:
    """Join spans and later ones of one rank; where they meet, the two become one."""
    if first and second and first[-1][1] == second[0][0]:
        return (*first[:-1], (first[-1][0], second[0][1]), *second[1:])
    return first + second


def _short(spans: tuple[Spans, ...]) -> str:
    limits = reprlib.Repr()
    limits.maxtuple = SHOWN
    return limits.repr(spans)


def _sequence(name: str, value: object) -> Iterable:
    if not isinstance(value, Iterable):
        raise ArgumentTypeError(f"{name}: {format_value(value)}, expected a sequence")
    return value


def _checked_spans(rank: int, given: object) -> Spans:
    """Return the spans of one rank as plain ints. Empty spans are dropped, adjacent ones joined."""
    name = f"spans[{rank}]"
    spans: list[Span] = []
    for span in _sequence(name, given):
        if not isinstance(span, (tuple, list)) or len(span) != 2:
            raise ArgumentTypeError(f"{name}: {format_value(span)}, expected a pair (start, stop)")
        start, stop = check_int(name, span[0]), check_int(name, span[1])
        if stop < start:
            raise ArgumentError(f"{name}: ({start}, {stop}) descends, expected start <= stop")
        if spans and start < spans[-1][1]:
            problem = "descend" if stop <= spans[-1][0] else "overlap"
            raise ArgumentError(f"{name}: {spans[-1]} and ({start}, {stop}) {problem}, expected ascending spans")
        if start < stop:
            spans.append((start, stop))
    return union(spans)


def _checked_size(size: object) -> int:
    return check_int("size", size, 1)


def _checked_rank(rank: object, size: int) -> int:
    rank = check_int("rank", rank, 0)
    if rank >= size:
        raise ArgumentError(f"rank: {rank}, expected less than {size}, the layout's size")
    return rank


def _checked_weights(weights: object) -> list[float]:
    values = list(_sequence("weights", weights))
    for weight in values:
        if isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer, np.floating)):
            raise ArgumentTypeError(f"weights: {format_value(weight)}, expected a number")
        if not 0 <= weight < float("inf"):
            raise ArgumentError(f"weights: {weight}, expected a finite number of at least 0")
    if not any(values):
        raise ArgumentError(f"weights: {format_value(values)}, expected at least one above 0")
    exponent = math.frexp(max(values))[1]  # scale them, so that sums of large weights do not overflow
    return [math.ldexp(value, -exponent) for value in values]


def _checked_axis(name: str, x: object, axis: object, tokens: int) -> int:
    if not isinstance(x, (mx.array, np.ndarray)):
        raise ArgumentTypeError(f"{name}: {type(x).__name__}, expected an mx.array or a NumPy array")
    axis = check_int("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        raise ArgumentError(f"axis: {axis}, expected an axis of {name}, which has {x.ndim} dimensions")
    if x.shape[axis] != tokens:
        raise ArgumentError(f"{name}: {x.shape[axis]} tokens on axis {axis}, expected {tokens}")
    return axis % x.ndim


def _cut(n: int, shares: Sequence[float], start: int) -> list[Span]:
    return in_proportion(check_int("n", n, 0), shares, check_int("start", start))


def _concatenate(pieces: list, axis: int):
    if len(pieces) == 1:
        return pieces[0]
    return mx.concatenate(pieces, axis) if isinstance(pieces[0], mx.array) else np.concatenate(pieces, axis)

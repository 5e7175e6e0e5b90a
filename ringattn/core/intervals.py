"""Sets of integers as ascending, disjoint, half-open spans ``(start, stop)``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from .arrays import read_only

Span = tuple[int, int]
Spans = tuple[Span, ...]


def union(spans: Iterable[Span]) -> Spans:
    """Merge `spans`, which may overlap and be in any order. Adjacent spans become one."""
    merged: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def intersection(a: Spans, b: Spans) -> Spans:
    """Intersect `a` and `b`."""
    found = []
    i = 0
    j = 0
    while i < len(a) and j < len(b):
        start = max(a[i][0], b[j][0])
        stop = min(a[i][1], b[j][1])
        if start < stop:
            found.append((start, stop))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return tuple(found)


def length(spans: Spans) -> int:
    """Count the integers in `spans`."""
    return sum(stop - start for start, stop in spans)


def halves(spans: Spans) -> tuple[Spans, Spans]:
    """Split each of `spans` into two halves. Odd integers go to the first and the second half in turn."""
    first: list[Span] = []
    second: list[Span] = []
    extra = 1
    for start, stop in spans:
        middle = (start + stop + extra) // 2
        extra ^= (stop - start) % 2
        first.append((start, middle))
        second.append((middle, stop))
    return union(first), union(second)


def in_proportion(n: int, shares: Sequence[float], start: int) -> list[Span]:
    """Cut `n` integers from `start` on into spans in proportion to `shares` (largest remainder, first spans first)."""
    exact = [n * share / sum(shares) for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    ends = [start + int(end) for end in np.cumsum(counts)]
    return list(zip([start, *ends], ends))


@lru_cache(maxsize=256)
def locate(part: Spans, whole: Spans) -> Spans:
    """Return the indices of the integers of `part` in the ascending list of those of `whole`, as spans."""
    pieces = intersection(part, whole)
    return union((at, at + stop - start) for at, (start, stop) in zip(indices(pieces, whole), pieces))


def indices(pieces: Spans, whole: Spans) -> list[int]:
    """Return the index of the first integer of each piece in the ascending list of the integers of `whole`.

    Each piece lies in one span of `whole`.
    """
    starts = [start for start, _ in whole]
    before = [0, *accumulate(stop - start for start, stop in whole)]
    held_by = [bisect_right(starts, start) - 1 for start, _ in pieces]
    return [start - starts[i] + before[i] for i, (start, _) in zip(held_by, pieces)]


def tokens_at(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """Return the index of tokens ``start:stop`` of an array whose token axis is `axis`."""
    return (slice(None),) * axis + (slice(start, stop),)


def positions(spans: Spans) -> np.ndarray:
    """List all integers of `spans` in order: int32 ``[length(spans)]``."""
    if len(spans) <= 1:
        return np.arange(*(spans[0] if spans else (0,)), dtype=np.int32)
    starts, stops = np.array(spans, np.int64).T
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return (np.repeat(starts - before, lengths) + np.arange(lengths.sum())).astype(np.int32)


def ends(positions: np.ndarray) -> Span:
    """Return the first and the last of ascending positions."""
    return int(positions[0]), int(positions[-1])


@lru_cache(maxsize=64)
def kept_positions(spans: Spans) -> np.ndarray:
    """List the integers of `spans` like `positions`, in a read-only array that is the same in every call."""
    return read_only(positions(spans))


def cut(positions: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Cut ascending positions into runs of at most `step` tokens, and wherever they jump by more than `step`.

    A run with tokens from both ends of the sequence would make all the tiles between them partial.
    """
    if len(positions) <= 1:
        yield from [(0, 1)] * len(positions)
        return
    jumps = np.flatnonzero(np.diff(positions) > step) + 1
    for first, last in zip([0, *jumps], [*jumps, len(positions)]):
        yield from ((start, min(start + step, last)) for start in range(int(first), int(last), step))

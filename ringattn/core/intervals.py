"""Sets of integers as ascending, disjoint, half-open spans ``(start, stop)``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Span = tuple[int, int]
Spans = tuple[Span, ...]


def union(spans: Iterable[Span]) -> Spans:
    """The integers in any of `spans`, which may overlap and come in any order; adjacent spans become one."""
    merged: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def intersection(a: Spans, b: Spans) -> Spans:
    """The integers in both `a` and `b`."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            found.append((start, stop))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return tuple(found)


def length(spans: Spans) -> int:
    """How many integers `spans` holds."""
    return sum(stop - start for start, stop in spans)


def halves(spans: Spans) -> tuple[Spans, Spans]:
    """Half of each of `spans`, and the other half; the odd integers go to either in turn."""
    first: list[Span] = []
    second: list[Span] = []
    extra = 1
    for start, stop in spans:
        middle = (start + stop + extra) // 2
        extra ^= (stop - start) % 2
        first.append((start, middle))
        second.append((middle, stop))
    return union(first), union(second)


def locate(part: Spans, whole: Spans) -> Spans:
    """Where the integers of `part` stand when those of `whole` are written in order: spans of indices."""
    found, before = [], 0
    for start, stop in whole:
        found += [(a - start + before, b - start + before) for a, b in intersection(part, ((start, stop),))]
        before += stop - start
    return union(found)


def tokens_at(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """The index of tokens ``start:stop`` of an array whose `axis` counts tokens."""
    return (slice(None),) * axis + (slice(start, stop),)


def positions(spans: Spans) -> np.ndarray:
    """All integers of `spans`, in order: int32 ``[length(spans)]``."""
    if len(spans) <= 1:
        return np.arange(*(spans[0] if spans else (0,)), dtype=np.int32)
    starts, stops = np.array(spans, np.int64).T
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return (np.repeat(starts - before, lengths) + np.arange(lengths.sum())).astype(np.int32)

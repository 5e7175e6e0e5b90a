"""Pairs that ring attention computes and tokens that it sends, for every rank and hop. Integers only.

The counts are those of `ringattn.ring.schedule` (the tests compare them), in closed form over arrays: a schedule
follows the spans of every source around the ring, and is slow to make for a thousand ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.intervals import Spans, length
from ..core.masks import Band
from ..ring.schedule import Sizes

FAR = 1 << 60  # a position after all others


@dataclass(frozen=True)
class Demand:
    """One call of ring attention.

    Attributes:
        pairs: Attending pairs of the staying tokens of a rank and the travelling tokens of a source ``[rank, source]``.
        blocks: Tokens of a source that arrive at hop h ``[source, hop]``; 0 at hop 0.
        results: Tokens of a source whose results leave the rank of hop h ``[source, hop]``; 0 at hop 0.
        cut: Query tokens of each rank that do not see all of the rank's own keys ``[rank]``.
    """

    pairs: np.ndarray
    blocks: np.ndarray
    results: np.ndarray
    cut: np.ndarray

    def bytes(self, sizes: Sizes) -> int:
        """Bytes that all ranks send."""
        return int(self.blocks.sum()) * sizes.block + int(self.results.sum()) * sizes.result


def pass_kv(queries: list[Spans], keys: list[Spans], band: Band) -> Demand:
    """Demand of keys that travel, for the spans of each rank's queries and keys.

    Exact for causal and full masks. With a window, the counts of tokens are an upper bound where a rank whose tokens
    stay has several spans.
    """
    pairs = count_pairs(queries, keys, band)
    blocks = _travelling(keys, _reach(queries, band))
    return Demand(pairs, blocks, np.zeros_like(blocks), _cut(queries, keys, pairs))


def pass_q(queries: list[Spans], keys: list[Spans], band: Band) -> Demand:
    """Demand of queries that travel, with their results one hop behind; see `pass_kv`."""
    pairs = count_pairs(queries, keys, band)
    seen = _reach(keys, band.transposed)
    return Demand(pairs.T, _travelling(queries, seen), _returning(queries, seen), _cut(queries, keys, pairs))


def choose(queries: list[Spans], keys: list[Spans], band: Band, key: Sizes, query: Sizes) -> tuple[str, Demand]:
    """The strategy that `ringattn.ring_attention` chooses, and its demand."""
    found = {"pass_kv": (pass_kv(queries, keys, band), key), "pass_q": (pass_q(queries, keys, band), query)}
    cost = {name: demand.bytes(sizes) for name, (demand, sizes) in found.items()}
    memory = {
        name: int(demand.blocks.max(initial=0)) * (2 * sizes.block + 3 * sizes.result)
        for name, (demand, sizes) in found.items()
    }
    less = cost["pass_q"] < cost["pass_kv"] and memory["pass_q"] <= memory["pass_kv"]
    name = "pass_q" if less else "pass_kv"
    return name, found[name][0]


def count_pairs(queries: list[Spans], keys: list[Spans], band: Band) -> np.ndarray:
    """Attending pairs of the queries of a rank and the keys of another ``[rank, rank]``."""
    a, b = (x[:, None, :, None] for x in _ends(queries))
    c, d = (x[None, :, None, :] for x in _ends(keys))
    pairs = (b - a) * (d - c)
    if band.high is not None:
        pairs = _up_to(a, b, c, d, band.high)
    if band.low is not None:
        pairs = pairs - _up_to(a, b, c, d, band.low - 1)
    return pairs.sum((2, 3))


def _cut(queries: list[Spans], keys: list[Spans], pairs: np.ndarray) -> np.ndarray:
    """Query tokens of each rank where the mask hides some of the rank's own keys."""
    q_len, k_len = (np.array([length(spans) for spans in ranks]) for ranks in (queries, keys))
    return np.where(pairs.diagonal() < q_len * k_len, q_len, 0)


def _up_to(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, reach: int) -> np.ndarray:
    """Pairs of queries in ``[a, b)`` and keys in ``[c, d)`` whose key is at most the query plus `reach`."""
    return _triangle(b + reach - c) - _triangle(a + reach - c) - _triangle(b + reach - d) + _triangle(a + reach - d)


def _triangle(n: np.ndarray) -> np.ndarray:
    """``1 + 2 + ... + n``; 0 for negative n."""
    n = np.maximum(n, 0)
    return n * (n + 1) // 2


def _ends(spans: list[Spans]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of each rank's spans ``[rank, spans]``; missing spans are empty."""
    most = max(1, *map(len, spans))
    table = np.array([[*one, *[(0, 0)] * (most - len(one))] for one in spans], np.int64)
    return table[..., 0], table[..., 1]


def _reach(spans: list[Spans], band: Band) -> tuple[np.ndarray, np.ndarray]:
    """The first position that some token of each rank sees, and the one after the last."""
    before = -FAR if band.low is None else band.low
    after = FAR if band.high is None else band.high
    low = np.array([one[0][0] + before if one else FAR for one in spans], np.int64)
    high = np.array([one[-1][1] + after if one else -FAR for one in spans], np.int64)
    return low, high


def _travelling(spans: list[Spans], seen: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Tokens of a source that arrive at each hop: those that the rank of this hop or a later one sees."""
    return _tokens_seen(spans, seen, slice(None, None, -1), first=0)


def _returning(spans: list[Spans], seen: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Tokens of a source whose results leave the rank of each hop: those that it or a rank before sees, after hop 0."""
    return _tokens_seen(spans, seen, slice(None), first=1)


def _tokens_seen(spans: list[Spans], seen: tuple[np.ndarray, np.ndarray], order: slice, first: int) -> np.ndarray:
    """Tokens of a source that the ranks of its hops see, from hop `first` on, accumulated in `order` over the hops.

    The ranks behind the source, and those before it, see one range of positions each; the union of both counts.
    """
    size = len(spans)
    hops = np.arange(size)
    at = hops[:, None] + hops[None]  # [source, hop]
    ranges = []
    for part in (at < size, at >= size):
        part = part & (hops >= first)
        low = np.where(part, seen[0][at % size], FAR)
        high = np.where(part, seen[1][at % size], -FAR)
        ranges.append(
            (np.minimum.accumulate(low[:, order], 1)[:, order], np.maximum.accumulate(high[:, order], 1)[:, order])
        )
    (low, high), (low_2, high_2) = ranges
    both = _tokens_between(spans, np.maximum(low, low_2), np.minimum(high, high_2))
    tokens = _tokens_between(spans, low, high) + _tokens_between(spans, low_2, high_2) - both
    tokens[:, 0] = 0
    return tokens


def _tokens_between(spans: list[Spans], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    starts, stops = (x[:, None, :] for x in _ends(spans))
    return np.maximum(np.minimum(stops, high[..., None]) - np.maximum(starts, low[..., None]), 0).sum(-1)

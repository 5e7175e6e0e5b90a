"""What each rank sends, receives and computes, hop by hop. Integers only: no arrays, no transport.

Something travels to the right around the ring: the keys and values of a rank (pass-KV; Liu et al., Ring Attention,
arXiv 2310.01889), or its queries, with their results one hop behind (pass-Q; Yang et al., arXiv 2411.01783). At hop h
rank r holds what started at rank r - h. A token travels on only while some rank further along still needs it. In the
gradient, keys and values have results too (their own gradients), and both ways are alike.

    pass_kv, 3 ranks          hop 0        hop 1        hop 2
    rank 0 attends to the     keys of 0    keys of 2    keys of 1
    rank 1                    keys of 1    keys of 0    keys of 2
    rank 2                    keys of 2    keys of 1    keys of 0
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .layout import Layout
from .mask import Band
from .spans import Spans, length, union

STRATEGIES = ("pass_kv", "pass_q", "gather")


@dataclass(frozen=True)
class Hop:
    """One hop of one rank. All spans are positions.

    Attributes:
        source: The rank whose tokens are held during this hop.
        held: The tokens of `source` that are here.
        compute: Those of them that this rank's own tokens attend to, or that attend to this rank's.
        send: Those that go on to the right neighbour.
        state: Where results travel too: those whose result, with this hop's work added, goes on to the right neighbour.
        returning: Those whose result comes in from the left before that.
    """

    source: int
    held: Spans
    compute: Spans
    send: Spans
    state: Spans = ()
    returning: Spans = ()


@dataclass(frozen=True)
class Schedule:
    """The hops of one rank, hop 0 on its own tokens, and the results that come home after the last one.

    What a rank receives for hop h is `hops[h].held`; hops at the end in which nothing happens are left out.
    """

    hops: tuple[Hop, ...]
    home: Spans = ()


@lru_cache(maxsize=32)
def plan(q_layout: Layout, kv_layout: Layout, band: Band, strategy: str, rank: int, gradient: bool = False) -> Schedule:
    """The schedule of `rank`. ``"gather"`` moves what pass-KV moves; it computes once, at the end."""
    if strategy == "pass_q":
        return _round_trip(q_layout, kv_layout, band.transposed, rank)
    if gradient:
        return _round_trip(kv_layout, q_layout, band, rank)
    return _pass_kv(q_layout, kv_layout, band, rank)


@lru_cache(maxsize=8)
def _legs(travelling: Layout, staying: Layout, band: Band) -> tuple[tuple[Leg, ...], ...]:
    """For each source rank and each hop of its tokens: how far they travel and whom they have met.

    `staying` tokens see `travelling` ones by `band`.
    """
    size = travelling.size
    legs = []
    for source in range(size):
        own = travelling.spans[source]
        meet = [band.seen_by(staying.spans[(source + h) % size], own) for h in range(size)]
        further: list[Spans] = [()]
        for spans in reversed(meet[1:]):
            further.append(union((*spans, *further[-1])))
        met: list[Spans] = [()]
        for spans in meet[1:]:
            met.append(union((*spans, *met[-1])))
        held = [own, *reversed(further)]
        legs.append(tuple(Leg(held[h], meet[h], held[h + 1], met[h]) for h in range(size)))
    return tuple(legs)


@dataclass(frozen=True)
class Leg:
    """Of the tokens of one source, at one hop: those held, those met here, those that go on, those met since hop 1."""

    held: Spans
    meet: Spans
    send: Spans
    met: Spans


def _pass_kv(q_layout: Layout, kv_layout: Layout, band: Band, rank: int) -> Schedule:
    hops = []
    for h, source in enumerate(_sources(rank, q_layout.size)):
        leg = _legs(kv_layout, q_layout, band)[source][h]
        hops.append(Hop(source, leg.held, leg.meet, leg.send))
    return Schedule(_trimmed(hops))


def _round_trip(travelling: Layout, staying: Layout, band: Band, rank: int) -> Schedule:
    """Results follow their tokens: from the first rank that adds to them through all further ones and home."""
    legs, size = _legs(travelling, staying, band), travelling.size
    hops = []
    for h, source in enumerate(_sources(rank, size)):
        leg = legs[source][h]
        hops.append(Hop(source, leg.held, leg.meet, leg.send, leg.met, legs[source][h - 1].met if h else ()))
    return Schedule(_trimmed(hops), legs[rank][size - 1].met)


def _sources(rank: int, size: int) -> list[int]:
    """Whose tokens `rank` holds at each hop."""
    return [(rank - h) % size for h in range(size)]


def _trimmed(hops: list[Hop]) -> tuple[Hop, ...]:
    busy = [h for h, hop in enumerate(hops) if h == 0 or hop.held or hop.returning]
    return tuple(hops[: busy[-1] + 1])


@dataclass(frozen=True)
class Traffic:
    """How many tokens a strategy moves over all ranks and hops: blocks (keys, or queries) and results."""

    blocks: int
    results: int
    largest_block: int


def traffic(q_layout: Layout, kv_layout: Layout, band: Band, strategy: str, gradient: bool = False) -> Traffic:
    """Count the tokens that all ranks send."""
    plans = [plan(q_layout, kv_layout, band, strategy, rank, gradient) for rank in range(q_layout.size)]
    hops = [hop for one in plans for hop in one.hops]
    blocks = [length(hop.send) for hop in hops]
    return Traffic(sum(blocks), sum(length(hop.state) for hop in hops), max(blocks))


def minimum(q_layout: Layout, kv_layout: Layout, band: Band) -> int:
    """The fewest key tokens any exchange of keys could move: each key once to each other rank that sees it."""
    return sum(length(leg.meet) for legs in _legs(kv_layout, q_layout, band) for leg in legs[1:])


class Sizes(NamedTuple):
    """Bytes of one token, all heads: what travels for it, and its result."""

    block: int
    result: int = 0


@lru_cache(maxsize=32)
def choose(q_layout: Layout, kv_layout: Layout, band: Band, keys: Sizes, queries: Sizes, gradient: bool = False) -> str:
    """The strategy that moves fewer bytes, from numbers that all ranks agree on.

    Args:
        keys: Of one key token and its value.
        queries: Of one query token (its row of an array mask included).
        gradient: Whether it is about the gradient.

    Returns:
        ``"pass_kv"`` or ``"pass_q"``. Pass-Q is taken only where what travels also needs no more memory than in
        pass-KV; ``"gather"``, which holds all keys at once, is never chosen.
    """
    cost, room = {}, {}
    for strategy, sizes in (("pass_kv", keys), ("pass_q", queries)):
        moved = traffic(q_layout, kv_layout, band, strategy, gradient)
        cost[strategy] = moved.blocks * sizes.block + moved.results * sizes.result
        room[strategy] = moved.largest_block * (2 * sizes.block + 3 * sizes.result)
    return "pass_q" if cost["pass_q"] < cost["pass_kv"] and room["pass_q"] <= room["pass_kv"] else "pass_kv"

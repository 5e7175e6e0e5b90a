"""What each rank sends, receives and computes, hop by hop. Integers only: no arrays, no transport.

Something travels to the right around the ring: the keys and values of a rank (pass-KV; Liu et al., Ring Attention,
arXiv 2310.01889), or its queries, with their results one hop behind (pass-Q; Yang et al., arXiv 2411.01783). At hop h
rank r holds what started at rank r - h. A token travels on only while some rank further along still needs it. In the
gradient, keys and values have results too (their own gradients), and both ways are alike.

    pass_kv, 3 ranks          hop 0        hop 1        hop 2
    rank 0 attends to the     keys of 0    keys of 2    keys of 1
    rank 1                    keys of 1    keys of 0    keys of 2
    rank 2                    keys of 2    keys of 1    keys of 0

On cables that carry both directions at once, half of each rank's tokens can travel to the right and half to the left:
two schedules on each rank, with the same number of hops and half the bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..core.intervals import Spans, halves, length, union
from ..core.masks import Band
from ..layout import Layout

STRATEGIES = ("pass_kv", "pass_q", "gather")
HALVED_BYTES = 1 << 20  # the shortest block that is worth two messages and two kernel calls where one would do


class Route(NamedTuple):
    """Which of every rank's tokens travel, and which way: 1 is to the right, -1 to the left."""

    step: int
    half: int | None  # 0 or 1; None for all

    def tokens(self, spans: Spans) -> Spans:
        """Those of a rank's that take it."""
        return spans if self.half is None else halves(spans)[self.half]

    @property
    def first(self) -> bool:
        """Whether it is the one in which a rank's tokens meet its own."""
        return not self.half


TO_THE_RIGHT = Route(1, None)
BOTH_WAYS = (Route(1, 0), Route(-1, 1))


@dataclass(frozen=True)
class Hop:
    """One hop of one rank. All spans are positions.

    Attributes:
        source: The rank whose tokens are held during this hop.
        held: The tokens of `source` that are here.
        compute: Those of them that this rank's own tokens attend to, or that attend to this rank's.
        send: Those that go on to the next rank.
        state: Where results travel too: those whose result, with this hop's work added, goes on to the next rank.
        returning: Those whose result comes in from the rank before.
    """

    source: int
    held: Spans
    compute: Spans
    send: Spans
    state: Spans = ()
    returning: Spans = ()


@dataclass(frozen=True)
class Schedule:
    """The hops of one rank on one route, hop 0 on its own tokens.

    What a rank receives for hop h is `hops[h].held`; hops at the end in which nothing happens are left out.

    Attributes:
        hops: See there.
        home: Its own tokens whose results come home after the last hop.
        own: Those that have results of this route, of hop 0 or come home.
        step: 1 where things travel to the right, -1 to the left.
    """

    hops: tuple[Hop, ...]
    home: Spans
    own: Spans
    step: int


@lru_cache(maxsize=64)
def plan(
    q_layout: Layout,
    kv_layout: Layout,
    band: Band,
    strategy: str,
    rank: int,
    gradient: bool = False,
    route: Route = TO_THE_RIGHT,
) -> Schedule:
    """The schedule of `rank`. ``"gather"`` moves what pass-KV moves; it computes once, at the end."""
    if strategy == "pass_q":
        return _journey(q_layout, kv_layout, band.transposed, rank, route, results=True)
    return _journey(kv_layout, q_layout, band, rank, route, results=gradient)


@lru_cache(maxsize=16)
def _legs(travelling: Layout, staying: Layout, band: Band, route: Route) -> tuple[tuple[Leg, ...], ...]:
    """For each source rank and each hop of its tokens: how far they travel and whom they have met.

    `staying` tokens see `travelling` ones by `band`.
    """
    size = travelling.size
    legs = []
    for source in range(size):
        own = route.tokens(travelling.spans[source])
        meet = [band.seen_by(staying.spans[(source + route.step * h) % size], own) for h in range(size)]
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


def _journey(travelling: Layout, staying: Layout, band: Band, rank: int, route: Route, results: bool) -> Schedule:
    """Results follow their tokens: from the first rank that adds to them through all further ones and home."""
    legs, size, own = _legs(travelling, staying, band, route), travelling.size, travelling.spans[rank]
    at_home = band.seen_by(staying.spans[rank], own) if route.first else ()
    hops = [Hop(rank, own, at_home, legs[rank][0].send)]
    for h in range(1, size):
        source = (rank - route.step * h) % size
        leg, before = legs[source][h], legs[source][h - 1]
        adding = (leg.met, before.met) if results else ()
        hops.append(Hop(source, leg.held, leg.meet, leg.send, *adding))
    home = legs[rank][size - 1].met if results else ()
    return Schedule(_trimmed(hops), home, own if route.first else home, route.step)


def _trimmed(hops: list[Hop]) -> tuple[Hop, ...]:
    busy = [h for h, hop in enumerate(hops) if h == 0 or hop.held or hop.returning]
    return tuple(hops[: busy[-1] + 1])


@dataclass(frozen=True)
class Traffic:
    """How many tokens a strategy moves over all ranks and hops: blocks (keys, or queries) and results."""

    blocks: int
    results: int
    largest_block: int


def traffic(
    q_layout: Layout,
    kv_layout: Layout,
    band: Band,
    strategy: str,
    gradient: bool = False,
    routes: Sequence[Route] = (TO_THE_RIGHT,),
) -> Traffic:
    """Count the tokens that all ranks send."""
    ranks = range(q_layout.size)
    plans = [plan(q_layout, kv_layout, band, strategy, rank, gradient, route) for rank in ranks for route in routes]
    hops = [hop for one in plans for hop in one.hops]
    blocks = [length(hop.send) for hop in hops]
    return Traffic(sum(blocks), sum(length(hop.state) for hop in hops), max(blocks))


def minimum(q_layout: Layout, kv_layout: Layout, band: Band) -> int:
    """The fewest key tokens any exchange of keys could move: each key once to each other rank that sees it."""
    return sum(length(leg.meet) for legs in _legs(kv_layout, q_layout, band, TO_THE_RIGHT) for leg in legs[1:])


class Sizes(NamedTuple):
    """Bytes of one token, all heads: what travels for it, and its result."""

    block: int
    result: int = 0

    def of(self, moved: Traffic) -> int:
        """All bytes that are `moved`."""
        return moved.blocks * self.block + moved.results * self.result


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
        cost[strategy] = sizes.of(moved)
        room[strategy] = moved.largest_block * (2 * sizes.block + 3 * sizes.result)
    return "pass_q" if cost["pass_q"] < cost["pass_kv"] and room["pass_q"] <= room["pass_kv"] else "pass_kv"


@lru_cache(maxsize=32)
def choose_routes(
    q_layout: Layout, kv_layout: Layout, band: Band, strategy: str, sizes: Sizes, gradient: bool = False
) -> tuple[Route, ...]:
    """`BOTH_WAYS` where blocks are long and no byte more travels for it, else `TO_THE_RIGHT` alone.

    A window's keys are needed by the next ranks to the right: to the left they would go nearly all the way round.
    """
    one, both = (
        traffic(q_layout, kv_layout, band, strategy, gradient, routes) for routes in ((TO_THE_RIGHT,), BOTH_WAYS)
    )
    halved = one.largest_block * sizes.block >= HALVED_BYTES and sizes.of(both) <= sizes.of(one)
    return BOTH_WAYS if halved else (TO_THE_RIGHT,)

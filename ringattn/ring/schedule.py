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
    """The part of each rank's tokens that travels, and its direction: 1 is to the right, -1 to the left."""

    step: int
    half: int | None  # 0 or 1; None for all

    def tokens(self, spans: Spans) -> Spans:
        """Return the part of a rank's tokens `spans` that uses this route."""
        return spans if self.half is None else halves(spans)[self.half]

    @property
    def first(self) -> bool:
        """Whether a rank's tokens meet its own on this route."""
        return not self.half


TO_THE_RIGHT = Route(1, None)
BOTH_WAYS = (Route(1, 0), Route(-1, 1))


@dataclass(frozen=True)
class Hop:
    """One hop of one rank. All spans are positions.

    Attributes:
        source: The rank whose tokens are held during this hop.
        held: The tokens of `source` that are here.
        compute: The tokens of `held` that attend to this rank's own tokens, or that these attend to.
        send: The tokens of `held` that go on to the next rank.
        state: The tokens whose result goes on to the next rank, with this hop's work added.
        returning: The tokens whose result comes in from the rank before.
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
        hops: The hops, in order.
        home: This rank's own tokens whose results come home after the last hop.
        own: This rank's own tokens that have results on this route: those of hop 0 and those that come home.
        step: 1 where tokens travel to the right, -1 to the left.
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
    """Make the schedule of `rank`. ``"gather"`` moves the same as pass-KV and computes once, at the end."""
    if strategy == "pass_q":
        return _build(q_layout, kv_layout, band.transposed, rank, route, results=True)
    return _build(kv_layout, q_layout, band, rank, route, results=gradient)


@lru_cache(maxsize=16)
def _source_hops(travelling: Layout, staying: Layout, band: Band, route: Route) -> tuple[tuple[SourceHop, ...], ...]:
    """Follow the tokens of each source rank around the ring, hop by hop.

    `staying` tokens see `travelling` ones by `band`.
    """
    size = travelling.size
    sources = []
    for source in range(size):
        own = route.tokens(travelling.spans[source])
        visible = [band.seen_by(staying.spans[(source + route.step * h) % size], own) for h in range(size)]
        further: list[Spans] = [()]
        for spans in reversed(visible[1:]):
            further.append(union((*spans, *further[-1])))
        since: list[Spans] = [()]
        for spans in visible[1:]:
            since.append(union((*spans, *since[-1])))
        held = [own, *reversed(further)]
        sources.append(tuple(SourceHop(held[h], visible[h], held[h + 1], since[h]) for h in range(size)))
    return tuple(sources)


@dataclass(frozen=True)
class SourceHop:
    """The tokens of one source at one hop.

    Attributes:
        held: The tokens that are here.
        visible: The tokens that have work to do here.
        send: The tokens that go on.
        visible_since: The tokens that had work to do on any rank from hop 1 to this one.
    """

    held: Spans
    visible: Spans
    send: Spans
    visible_since: Spans


def _build(travelling: Layout, staying: Layout, band: Band, rank: int, route: Route, results: bool) -> Schedule:
    """Make the schedule of `rank`.

    Results follow their tokens: from the first rank that adds to them through all further ones and home.
    """
    sources = _source_hops(travelling, staying, band, route)
    size, own = travelling.size, travelling.spans[rank]
    at_home = band.seen_by(staying.spans[rank], own) if route.first else ()
    hops = [Hop(rank, own, at_home, sources[rank][0].send)]
    for h in range(1, size):
        source = (rank - route.step * h) % size
        here, before = sources[source][h], sources[source][h - 1]
        adding = (here.visible_since, before.visible_since) if results else ()
        hops.append(Hop(source, here.held, here.visible, here.send, *adding))
    home = sources[rank][size - 1].visible_since if results else ()
    return Schedule(_trimmed(hops), home, own if route.first else home, route.step)


def _trimmed(hops: list[Hop]) -> tuple[Hop, ...]:
    busy = [h for h, hop in enumerate(hops) if h == 0 or hop.held or hop.returning]
    return tuple(hops[: busy[-1] + 1])


@dataclass(frozen=True)
class Traffic:
    """Tokens that a strategy moves over all ranks and hops: blocks (keys, or queries) and results."""

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
    """Count the fewest key tokens that any exchange could move: each key once to each other rank that sees it."""
    return sum(
        length(hop.visible) for hops in _source_hops(kv_layout, q_layout, band, TO_THE_RIGHT) for hop in hops[1:]
    )


class Sizes(NamedTuple):
    """Bytes of one token, all heads: what travels for it, and its result."""

    block: int
    result: int = 0

    def of(self, moved: Traffic) -> int:
        """Return the bytes of all that is `moved`."""
        return moved.blocks * self.block + moved.results * self.result


@lru_cache(maxsize=32)
def choose(q_layout: Layout, kv_layout: Layout, band: Band, keys: Sizes, queries: Sizes, gradient: bool = False) -> str:
    """Choose the strategy that moves fewer bytes, from numbers that all ranks agree on.

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
    """Choose `BOTH_WAYS` where blocks are long and no byte more travels for it, else `TO_THE_RIGHT` alone.

    A window's keys are needed by the next ranks to the right: to the left they would go nearly all the way round.
    """
    one, both = (
        traffic(q_layout, kv_layout, band, strategy, gradient, routes) for routes in ((TO_THE_RIGHT,), BOTH_WAYS)
    )
    halved = one.largest_block * sizes.block >= HALVED_BYTES and sizes.of(both) <= sizes.of(one)
    return BOTH_WAYS if halved else (TO_THE_RIGHT,)

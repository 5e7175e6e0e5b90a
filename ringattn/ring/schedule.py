"""The schedule of a rank: sends, receives and computation, hop by hop. Integers only: no arrays, no transport.

Tokens travel to the right around the ring: the keys and values of each rank (pass-KV; Liu et al., Ring Attention,
arXiv 2310.01889), or its queries, with their results one hop behind (pass-Q; Yang et al., arXiv 2411.01783). At hop h
rank r holds the tokens of rank r - h. A token travels on only while a later rank needs it. In the gradient, keys and
values have results too (their gradients), and the two strategies have the same form.

    pass_kv, 3 ranks          hop 0        hop 1        hop 2
    rank 0 attends to the     keys of 0    keys of 2    keys of 1
    rank 1                    keys of 1    keys of 0    keys of 2
    rank 2                    keys of 2    keys of 1    keys of 0

On full-duplex cables, half of each rank's tokens can travel to the right and half to the left. Each rank then has two
schedules, with the same number of hops and half the bytes each.
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
HALVED_BYTES = 1 << 20  # the shortest block that is worth splitting into two messages and two kernel calls


class Route(NamedTuple):
    """Part of each rank's tokens that travels, and its direction: 1 to the right, -1 to the left."""

    step: int
    half: int | None  # 0 or 1; None means all tokens

    def tokens(self, spans: Spans) -> Spans:
        """Return the tokens of `spans` that use this route."""
        return spans if self.half is None else halves(spans)[self.half]

    @property
    def first(self) -> bool:
        """Whether a rank's tokens attend to the same rank's tokens on this route, at hop 0."""
        return not self.half


TO_THE_RIGHT = Route(1, None)
BOTH_WAYS = (Route(1, 0), Route(-1, 1))


@dataclass(frozen=True)
class Hop:
    """One hop of one rank. All spans are positions.

    Attributes:
        source: The rank whose tokens this rank holds.
        held: The tokens of `source` that this rank holds.
        compute: The tokens of `held` that form attending pairs with this rank's own tokens.
        send: The tokens of `held` that this rank sends on.
        state: The tokens whose result this rank sends on, with this hop's work added.
        returning: The tokens whose result this rank receives.
    """

    source: int
    held: Spans
    compute: Spans
    send: Spans
    state: Spans = ()
    returning: Spans = ()


@dataclass(frozen=True)
class Schedule:
    """Hops of one rank on one route. Hop 0 is on its own tokens.

    For hop h the rank receives `hops[h].held`. Idle hops at the end are left out.

    Attributes:
        hops: The hops, in order.
        home: This rank's own tokens whose results return after the last hop.
        own: This rank's own tokens that have results on this route, from hop 0 or returned.
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
    """Make the schedule of `rank`. ``"gather"`` moves the same tokens as pass-KV and computes once, at the end."""
    if strategy == "pass_q":
        return _build(q_layout, kv_layout, band.transposed, rank, route, results=True)
    return _build(kv_layout, q_layout, band, rank, route, results=gradient)


@lru_cache(maxsize=16)
def _source_hops(travelling: Layout, staying: Layout, band: Band, route: Route) -> tuple[tuple[SourceHop, ...], ...]:
    """Follow the tokens of each source rank around the ring, hop by hop.

    `band` says which `travelling` tokens the `staying` tokens see.
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
    """Tokens of one source at one hop.

    Attributes:
        held: The tokens that the rank of this hop holds.
        visible: The tokens that form attending pairs with tokens of this rank.
        send: The tokens that travel on.
        visible_since: The tokens that were visible at any hop from 1 to this one.
    """

    held: Spans
    visible: Spans
    send: Spans
    visible_since: Spans


def _build(travelling: Layout, staying: Layout, band: Band, rank: int, route: Route, results: bool) -> Schedule:
    """Make the schedule of `rank`.

    Results follow their tokens, from the first rank that adds to them through all later ranks and home.
    """
    sources = _source_hops(travelling, staying, band, route)
    size = travelling.size
    own = travelling.spans[rank]
    at_home = band.seen_by(staying.spans[rank], own) if route.first else ()
    hops = [Hop(rank, own, at_home, sources[rank][0].send)]
    for h in range(1, size):
        source = (rank - route.step * h) % size
        here = sources[source][h]
        before = sources[source][h - 1]
        adding = (here.visible_since, before.visible_since) if results else ()
        hops.append(Hop(source, here.held, here.visible, here.send, *adding))
    home = sources[rank][size - 1].visible_since if results else ()
    return Schedule(_trimmed(hops), home, own if route.first else home, route.step)


def _trimmed(hops: list[Hop]) -> tuple[Hop, ...]:
    busy = [h for h, hop in enumerate(hops) if h == 0 or hop.held or hop.returning]
    return tuple(hops[: busy[-1] + 1])


@dataclass(frozen=True)
class Traffic:
    """Token counts that a strategy moves over all ranks and hops: blocks (keys or queries) and results."""

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
    schedules = [plan(q_layout, kv_layout, band, strategy, rank, gradient, route) for rank in ranks for route in routes]
    hops = [hop for schedule in schedules for hop in schedule.hops]
    blocks = [length(hop.send) for hop in hops]
    return Traffic(sum(blocks), sum(length(hop.state) for hop in hops), max(blocks))


def minimum(q_layout: Layout, kv_layout: Layout, band: Band) -> int:
    """Count the fewest key tokens that any exchange can move: each key once to each other rank that sees it."""
    return sum(
        length(hop.visible) for hops in _source_hops(kv_layout, q_layout, band, TO_THE_RIGHT) for hop in hops[1:]
    )


class Sizes(NamedTuple):
    """Bytes of one token and of its result, all heads together."""

    block: int
    result: int = 0

    def of(self, moved: Traffic) -> int:
        """Return the bytes of `moved`."""
        return moved.blocks * self.block + moved.results * self.result


@lru_cache(maxsize=32)
def choose(q_layout: Layout, kv_layout: Layout, band: Band, keys: Sizes, queries: Sizes, gradient: bool = False) -> str:
    """Choose the strategy that moves fewer bytes, from numbers that all ranks agree on.

    Args:
        keys: The bytes of one key token and its value.
        queries: The bytes of one query token, with its row of an array mask.
        gradient: Whether the gradient is computed.

    Returns:
        ``"pass_kv"`` or ``"pass_q"``. Pass-Q is chosen only where its travelling blocks also need no more memory than
        those of pass-KV. ``"gather"``, which holds all keys at once, is never chosen.
    """
    cost = {}
    memory = {}
    for strategy, sizes in (("pass_kv", keys), ("pass_q", queries)):
        moved = traffic(q_layout, kv_layout, band, strategy, gradient)
        cost[strategy] = sizes.of(moved)
        memory[strategy] = moved.largest_block * (2 * sizes.block + 3 * sizes.result)
    return "pass_q" if cost["pass_q"] < cost["pass_kv"] and memory["pass_q"] <= memory["pass_kv"] else "pass_kv"


@lru_cache(maxsize=32)
def choose_routes(
    q_layout: Layout, kv_layout: Layout, band: Band, strategy: str, sizes: Sizes, gradient: bool = False
) -> tuple[Route, ...]:
    """Choose `BOTH_WAYS` where blocks are long and it moves no more bytes, else `TO_THE_RIGHT` alone.

    With a window the next ranks to the right need the keys. To the left the keys would travel around nearly all ranks.
    """
    one, both = (
        traffic(q_layout, kv_layout, band, strategy, gradient, routes) for routes in ((TO_THE_RIGHT,), BOTH_WAYS)
    )
    halved = one.largest_block * sizes.block >= HALVED_BYTES and sizes.of(both) <= sizes.of(one)
    return BOTH_WAYS if halved else (TO_THE_RIGHT,)

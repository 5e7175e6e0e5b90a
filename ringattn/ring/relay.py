"""Blocks passed on around the ring: the relay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

from ..core.arrays import view
from ..core.intervals import length, union
from ..transport.interface import Direction, Links, Transfer, Transport
from .blocks import Block, copy_tokens, evaluate
from .device_slots import slots_for
from .schedule import Hop, Schedule
from .slots import Arrival, with_tokens
from .staging import from_host, to_host

T = TypeVar("T")
Posted = tuple[list[tuple[int, Hop, Arrival]], list[Transfer]]  # what `relay` returns


def relay(ring: Transport, own: Block, schedules: Sequence[Schedule], links: Links | None = None) -> Posted:
    """Post all transfers of blocks. Each block is forwarded on arrival, even while this rank computes.

    With `links`, blocks travel from GPU to GPU. Transfers start once the caller calls `links.advance`.

    Returns:
        The hops of all schedules in the order in which ranks must do them, each with its number and its block. The
        caller releases each block after use. And the sends, which the caller waits for at the end.
    """
    posted = [_post_route(Direction(ring, schedule.step, links), own, schedule.hops) for schedule in schedules]
    return interleave_hops([arrivals for arrivals, _ in posted]), [sent for _, sends in posted for sent in sends]


def _post_route(direction: Direction, own: Block, hops: Sequence[Hop]) -> Posted:
    first = hops[0].send
    sent = to_host(own) if direction.links is None else own
    as_it_is = direction.links is None and first == sent.spans and sent.packed
    copied = () if as_it_is else first
    slots = slots_for(direction)(sent, [hop.held for hop in hops[1:]], keep=copied)
    arrivals, sends = [], []
    for h, hop in enumerate(hops):
        arrival = slots.recv(direction, hop.held, h - 1) if h else Arrival(own)
        if hop.send:
            source = arrival if h else slots.keep(copied) if copied else Arrival(sent)
            sends.append(source.forward(direction, hop.send, h))
        arrivals.append((h, hop, arrival))
    return arrivals, sends


def interleave_hops(routes: Iterable[Iterable[T]]) -> list[T]:
    """Return hop 0 of each route, then hop 1 of each, and so on.

    All ranks use this order, so that none blocks: a hop needs only the previous hops of other ranks.
    """
    return [x for turn in zip_longest(*routes) for x in turn if x is not None]


def collect(ring: Transport, own: Block, schedules: Sequence[Schedule]) -> Block:
    """Collect all tokens that the hops of `schedules` compute on in one block, in the order of their positions."""
    own = to_host(own)
    arrivals, sends = relay(ring, own, schedules)
    spans = union(span for _, hop, _ in arrivals for span in hop.compute)
    shapes = [with_tokens(x.shape, axis, length(spans)) for x, axis in zip(own.arrays, own.axes)]
    arrays = [own.empty(i, shape) for i, shape in enumerate(shapes)]
    evaluate(own.arrays)
    for h, hop, arrival in arrivals:
        if hop.compute and arrival.transfer is not None:
            with ring.tracer.span("wait", h):
                ring.wait(arrival.transfer)
        if hop.compute:
            for into, x, axis in zip(arrays, arrival.block.arrays, own.axes):
                copy_tokens(view(x), arrival.block.spans, view(into), spans, axis, hop.compute)
        arrival.release()
    ring.wait(*sends)
    return from_host(own.like(arrays, spans))

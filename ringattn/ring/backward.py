"""The gradient of ring attention: the schedules of the forward pass, with gradients one hop behind their blocks."""

from __future__ import annotations

import abc
from dataclasses import replace
from functools import partial
from typing import ClassVar

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..core.intervals import length
from ..transport.consensus import raise_on_all_ranks
from .accumulators import merge_sums
from .blocks import Block
from .blocks import rows as rows_of
from .call import Arrays, Arrive, RingCall
from .device_results import accumulator_for
from .loop import WHAT, forgetting, round_trip
from .relay import Posted, relay

GRADIENT = f"the gradient of {WHAT}"


def backward(call: RingCall, dout: mx.array, dlse: mx.array, out: mx.array, lse: mx.array) -> list[mx.array]:
    """Compute the gradients with respect to `call.arrays`. Collective."""
    ring = call.ring
    links = ring.links if call.stays_on_gpu else None
    with ring.call(GRADIENT):
        with forgetting(links):
            with raise_on_all_ranks(ring, GRADIENT):
                mx.eval(*call.arrays, dout, dlse)
                passing = PassQ if call.chosen(gradient=True) == "pass_q" else PassKV
                ring.tracer.choose(passing.name)
                work = passing(replace(call, links=links), call.kernel.rows(out, lse, dout, dlse))
                posted = work.post() if links is not None else None
                # Python takes about as long to agree as a GPU to compute on a short block.
                first = work.own_hop() if call.stays_on_gpu else None
                fields = call.fields()
            work.call = call.agreed(GRADIENT, fields)
            if work.call.links is None:
                posted = None
        with ring.break_ring_on_error():
            sums = work.travel(posted or work.post(), first)
            del posted, first  # their memory
            found = call.options.gradients(sums, work.rows, call.arrays[0].dtype)
            mx.eval(found)
    return found


class Passing(abc.ABC):
    """The work of one strategy: blocks pass around the ring, with their gradients one hop behind.

    Attributes:
        call: The call.
        rows: The rows of this rank's queries.
        own: The block that this rank sends.
    """

    name: ClassVar[str]
    own: Block

    def __init__(self, call: RingCall, rows: Rows):
        self.call = call
        self.rows = rows
        self._schedules = call.schedules(gradient=True)

    @abc.abstractmethod
    def build(self, block: Block, arrive: Arrive) -> Arrays:
        """Build the sums with the gradients of a block that passes: q, k, v, and the mask if it has a gradient.

        See `RingCall.run` for `arrive`.
        """

    @abc.abstractmethod
    def keep(self, sums: Arrays) -> Arrays:
        """Keep the `sums` that stay, once they are computed, and return those that travel."""

    @abc.abstractmethod
    def neutral(self, tokens: int) -> Arrays:
        """Make zeros for the sums of `tokens` tokens that travel."""

    @abc.abstractmethod
    def gradients(self, travelled: Arrays) -> Gradients:
        """Join the sums that came home and those that stayed."""

    def post(self) -> Posted:
        """Post the transfers of blocks."""
        return relay(self.call.ring, self.own, self._schedules, self.call.links)

    def own_hop(self) -> Arrays | None:
        """Start to compute on the own block, which needs no other rank. Return what travels of its sums."""
        spans = self._schedules[0].hops[0].compute
        return self.keep(self.call.run(0, None, partial(self.build, rows_of(self.own, spans)))) if spans else None

    def travel(self, posted: Posted, first: Arrays | None) -> Gradients:
        """Send the own block around the ring, and add up. `first` is what `own_hop` returned."""
        accumulator = accumulator_for(self.call.links)(self.neutral, merge_sums)
        return self.gradients(round_trip(self.call, posted, self._schedules, accumulator, self.build, self.keep, first))


class PassQ(Passing):
    """Queries with their rows pass."""

    name = "pass_q"

    def __init__(self, call: RingCall, rows: Rows):
        super().__init__(call, rows)
        self.own = call.queries(rows)
        self._keys = call.keys()
        self._sums = call.gradients_of_keys(length(self._keys.spans))

    def build(self, block: Block, arrive: Arrive) -> Arrays:
        q, *mask = self.neutral(length(block.spans))
        return self.call.backward_block(block, self._keys, Gradients(q, *self._sums, *mask), arrive)

    def keep(self, sums: Arrays) -> Arrays:
        q, k, v, *mask = sums
        self._sums = k, v
        return [q, *mask]

    def neutral(self, tokens: int) -> Arrays:
        return self.call.gradients_of_queries(tokens)

    def gradients(self, travelled: Arrays) -> Gradients:
        q, *mask = travelled
        return Gradients(q, *self._sums, *mask)


class PassKV(Passing):
    """Keys and values pass."""

    name = "pass_kv"

    def __init__(self, call: RingCall, rows: Rows):
        super().__init__(call, rows)
        self.own = call.keys()
        self._queries = call.queries(rows)
        self._sums = call.gradients_of_queries(length(self._queries.spans))

    def build(self, block: Block, arrive: Arrive) -> Arrays:
        q, *mask = self._sums
        sums = Gradients(q, *self.neutral(length(block.spans)), *mask)
        return self.call.backward_block(self._queries, block, sums, arrive)

    def keep(self, sums: Arrays) -> Arrays:
        q, k, v, *mask = sums
        self._sums = q, *mask
        return k, v

    def neutral(self, tokens: int) -> Arrays:
        return self.call.gradients_of_keys(tokens)

    def gradients(self, travelled: Arrays) -> Gradients:
        q, *mask = self._sums
        return Gradients(q, *travelled, *mask)

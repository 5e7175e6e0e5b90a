"""The gradient of ring attention: the schedules of the forward pass, with gradients one hop behind their blocks."""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import ClassVar

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..core.intervals import length
from ..transport.consensus import raise_on_all_ranks
from .accumulators import merge_sums
from .blocks import Block
from .blocks import rows as rows_of
from .call import RingCall
from .device_results import accumulator_for
from .loop import WHAT, Arrays, round_trip

GRADIENT = f"the gradient of {WHAT}"


def backward(call: RingCall, dout: mx.array, dlse: mx.array, out: mx.array, lse: mx.array) -> list[mx.array]:
    """Compute the gradients with respect to `call.arrays`. Collective."""
    ring = call.ring
    with ring.call(GRADIENT):
        with raise_on_all_ranks(ring, GRADIENT):
            mx.eval(*call.arrays, dout, dlse)
            passing = PassQ if call.chosen(gradient=True) == "pass_q" else PassKV
            ring.tracer.choose(passing.name)
            early = call.stays_on_gpu
            call = replace(call, links=ring.links if early else None)
            work = passing(call, call.kernel.rows(out, lse, dout, dlse))
            # Python takes about as long to agree and to post the messages as a GPU to compute on a short block.
            first = work.own_hop() if early else None
            fields = call.fields()
        work.call = call.agreed(GRADIENT, fields)
        with ring.break_ring_on_error():
            sums = work.travel(first)
            found = call.options.gradients(sums, work.rows, call.arrays[0].dtype)
            mx.eval(found)
    return found


class Passing(abc.ABC):
    """The work of one strategy: blocks pass around the ring, with their gradients one hop behind.

    Attributes:
        call: The call, which has its links once the ranks agree.
        rows: The rows of this rank's queries.
        schedules: The hops of each route.
        own: The block that this rank sends.
    """

    name: ClassVar[str]
    own: Block

    def __init__(self, call: RingCall, rows: Rows):
        self.call = call
        self.rows = rows
        self.schedules = call.schedules(gradient=True)

    @abc.abstractmethod
    def add(self, hop: int, block: Block) -> Arrays:
        """Compute on a block that passes: add to the sums that stay, and return those that travel."""

    @abc.abstractmethod
    def neutral(self, tokens: int) -> Arrays:
        """Make zeros for the sums of `tokens` tokens that travel."""

    @abc.abstractmethod
    def gradients(self, travelled: Arrays) -> Gradients:
        """Join the sums that came home and those that stayed."""

    def own_hop(self) -> Arrays | None:
        """Start to compute on the own block, which needs no other rank."""
        spans = self.schedules[0].hops[0].compute
        return self.add(0, rows_of(self.own, spans)) if spans else None

    def travel(self, first: Arrays | None) -> Gradients:
        """Send the own block around the ring, and add up. `first` is what `own_hop` returned."""
        results = accumulator_for(self.call.links)(self.neutral, merge_sums)
        return self.gradients(round_trip(self.call, self.own, self.schedules, results, self.add, first))


class PassQ(Passing):
    """Queries with their rows pass."""

    name = "pass_q"

    def __init__(self, call: RingCall, rows: Rows):
        super().__init__(call, rows)
        self.own = call.queries(rows)
        self._keys = call.keys()
        self._sums = call.gradients_of_keys(length(self._keys.spans))

    def add(self, hop: int, block: Block) -> Arrays:
        q, *mask = self.neutral(length(block.spans))
        found = self.call.backward_block(hop, block, self._keys, Gradients(q, *self._sums, *mask))
        self._sums = found.k, found.v
        return [x for x in (found.q, found.mask) if x is not None]

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

    def add(self, hop: int, block: Block) -> Arrays:
        q, *mask = self._sums
        sums = Gradients(q, *self.neutral(length(block.spans)), *mask)
        found = self.call.backward_block(hop, self._queries, block, sums)
        self._sums = tuple(x for x in (found.q, found.mask) if x is not None)
        return found.k, found.v

    def neutral(self, tokens: int) -> Arrays:
        return self.call.gradients_of_keys(tokens)

    def gradients(self, travelled: Arrays) -> Gradients:
        q, *mask = self._sums
        return Gradients(q, *travelled, *mask)

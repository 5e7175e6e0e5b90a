"""The gradient of ring attention: the schedules of the forward pass, with gradients one hop behind their blocks."""

from __future__ import annotations

import abc
from dataclasses import replace
from functools import partial
from typing import ClassVar

import mlx.core as mx

from ..autograd.evaluation import evaluate, start_evaluation
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
    """Compute the gradients with respect to `call.arrays`. Collective.

    Between GPUs this returns when all messages have arrived and the last work has started.
    """
    ring = call.ring
    links = ring.links if call.stays_on_gpu else None
    with ring.call(GRADIENT):
        with forgetting(links):
            with raise_on_all_ranks(ring, GRADIENT):
                passing = PassQ if call.chosen(gradient=True) == "pass_q" else PassKV
                ring.tracer.choose(passing.name)
                work = passing(replace(call, links=links), call.kernel.rows(out, lse, dout, dlse))
                posted = work.post() if links is not None else None
                # Python takes about as long to agree as a GPU to compute on a short block.
                first = work.own_hop() if call.stays_on_gpu else None
                evaluate(*call.arrays, dout, dlse)  # here, so that an error in them is one of all ranks
                fields = call.fields()
            work.call = call.agreed(GRADIENT, fields)
            if work.call.links is None:
                posted = None
        with ring.break_ring_on_error():
            sums = work.travel(posted or work.post(), first)
            del posted, first  # their memory
            found = call.options.gradients(sums, work.rows, call.arrays[0].dtype)
            (start_evaluation if work.call.runs_ahead else evaluate)(*found)
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
    _sums: Arrays

    def __init__(self, call: RingCall, rows: Rows):
        self.call = call
        self.rows = rows
        self._schedules = call.schedules(gradient=True)

    @abc.abstractmethod
    def build(self, block: Block, arrive: Arrive) -> Arrays:
        """Build the sums that travel, with the gradients of a block that passes, and keep those that stay.

        See `RingCall.run` for `arrive`.
        """

    def settle(self, hop: int) -> Arrays:
        """Compute the sums that stay, and return them."""
        if self.call.kernel.lazy:
            self._sums = self.call.run(hop, None, lambda arrive: self._sums)
        return self._sums

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
        if not spans:
            return None
        travelling = self.call.run(0, None, partial(self.build, rows_of(self.own, spans)))
        self.settle(0)
        return travelling

    def travel(self, posted: Posted, first: Arrays | None) -> Gradients:
        """Send the own block around the ring, and add up. `first` is what `own_hop` returned."""
        accumulator = accumulator_for(self.call.links)(self.neutral, merge_sums)
        work = round_trip(self.call, posted, self._schedules, accumulator, self.build, self.settle, first)
        return self.gradients(work)


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
        sums = Gradients(q, *self._sums, *mask)
        q, k, v, *mask = self.call.backward_block(block, self._keys, sums, arrive)
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
        q, k, v, *mask = self.call.backward_block(self._queries, block, sums, arrive)
        self._sums = q, *mask
        return [k, v]

    def neutral(self, tokens: int) -> Arrays:
        return self.call.gradients_of_keys(tokens)

    def gradients(self, travelled: Arrays) -> Gradients:
        q, *mask = self._sums
        return Gradients(q, *travelled, *mask)

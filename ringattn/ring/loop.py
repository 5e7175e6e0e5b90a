"""Attention over a sequence spread over the ranks of a ring: where a schedule, a transport and a kernel meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx

from ..autograd.custom_function import start_evaluation
from ..core.gradients import Gradients, Rows
from ..core.intervals import length
from ..core.online_softmax import State, finish
from ..transport.consensus import agree, heard
from .accumulators import Kind, add_states, add_sums, post
from .blocks import Block
from .blocks import rows as rows_of
from .call import RingCall
from .relay import by_turns, collect, relay
from .schedule import Schedule

WHAT = "ring_attention"
GRADIENT = f"the gradient of {WHAT}"

Arrays = Sequence[mx.array]


def forward(call: RingCall) -> tuple[mx.array, mx.array]:
    """Agree with the other ranks, run the schedule, finish."""
    with heard(call.ring, WHAT):
        # Keys and values first and alone: the first send needs them, and must not wait for other arithmetic.
        mx.eval(*call.keys().arrays)
        start_evaluation(*call.arrays)
        fields = call.fields()
    agree(call.ring, WHAT, fields)
    with call.ring.committed():
        state = _STRATEGIES[call.chosen()](call)
        out, lse = finish(state, call.options.sinks, call.options.out_dtype)
        del state
        mx.eval(out, lse)
    return out, lse


def backward(call: RingCall, dout: mx.array, dlse: mx.array, out: mx.array, lse: mx.array) -> list[mx.array]:
    """The gradients by `call.arrays`, with the other ranks."""
    ring = call.ring
    with ring.call(GRADIENT):
        with heard(ring, GRADIENT):
            mx.eval(*call.arrays, dout, dlse)
            rows = call.kernel.rows(out, lse, dout, dlse)
            fields = call.fields()
        agree(ring, GRADIENT, fields)
        with ring.committed():
            sums = (_backward_pass_q if call.chosen(gradient=True) == "pass_q" else _backward_pass_kv)(call, rows)
            found = call.options.gradients(sums, rows, call.arrays[0].dtype)
            mx.eval(found)
    return found


def _pass_kv(call: RingCall) -> State:
    """Keys and values travel; the state of this rank's queries is carried from hop to hop."""
    arrivals, sends = relay(call.ring, call.keys(), call.schedules())
    queries, state, h = call.queries(), None, 0
    for h, hop, arrival in arrivals:
        call.ring.at(WHAT, h)
        if hop.compute:
            call.wait(h, arrival.transfer)
            state = call.attend(h, queries, arrival.block, state)
        arrival.release()
    call.wait(h + 1, *sends)
    return call.empty_state(call.arrays[0].shape[2]) if state is None else state


def _gather(call: RingCall) -> State:
    """Keys and values travel to all ranks whose queries see them, and each computes once."""
    schedules = call.schedules()
    whole = collect(call.ring, call.keys(), schedules)
    hops = max(len(schedule.hops) for schedule in schedules)
    call.ring.at(WHAT, hops)
    return call.attend(hops, call.queries(), whole, None)


def _pass_q(call: RingCall) -> State:
    """Queries travel, and their states one hop behind; each rank adds what its own keys contribute."""
    keys = call.keys()

    def add(h: int, block: Block) -> State:
        return call.attend(h, block, keys, None)

    return State(*_round_trip(call, call.queries(), call.schedules(), Kind(call.empty_state, add_states), add))


def _backward_pass_q(call: RingCall, rows: Rows) -> Gradients:
    """Queries travel with what the gradient needs of them, and their own gradients one hop behind."""
    keys = call.keys()
    k, v = call.gradients_of_keys(length(keys.spans))

    def add(h: int, block: Block) -> Arrays:
        nonlocal k, v
        q, *mask = call.gradients_of_queries(length(block.spans))
        found = call.backward_block(h, block, keys, Gradients(q, k, v, *mask))
        k, v = found.k, found.v
        return [x for x in (found.q, found.mask) if x is not None]

    results = Kind(call.gradients_of_queries, add_sums)
    q, *mask = _round_trip(call, call.queries(rows), call.schedules(gradient=True), results, add)
    return Gradients(q, k, v, *mask)


def _backward_pass_kv(call: RingCall, rows: Rows) -> Gradients:
    """Keys and values travel, and their own gradients one hop behind."""
    queries = call.queries(rows)
    q, *mask = call.gradients_of_queries(length(queries.spans))

    def add(h: int, block: Block) -> Arrays:
        nonlocal q, mask
        found = call.backward_block(
            h, queries, block, Gradients(q, *call.gradients_of_keys(length(block.spans)), *mask)
        )
        q, mask = found.q, [x for x in (found.mask,) if x is not None]
        return found.k, found.v

    results = Kind(call.gradients_of_keys, add_sums)
    k, v = _round_trip(call, call.keys(), call.schedules(gradient=True), results, add)
    return Gradients(q, k, v, *mask)


def _round_trip(
    call: RingCall, own: Block, schedules: Sequence[Schedule], kind: Kind, compute: Callable[[int, Block], Arrays]
) -> tuple[mx.array, ...]:
    """`own` travels, and its results one hop behind; each rank adds what it computes, and they come home."""
    arrivals, sends = relay(call.ring, own, schedules)
    routes = [post(call.ring, schedule, kind) for schedule in schedules]
    at_home: Block | None = None
    h = 0
    for (h, hop, arrival), (stop, following) in zip(arrivals, by_turns(map(pairwise, routes))):
        call.ring.at(WHAT, h)
        added = None
        if hop.compute:
            call.wait(h, arrival.transfer)
            added = kind.block(compute(h, rows_of(arrival.block, hop.compute)), hop.compute)
        arrival.release()
        following.due()
        if h == 0:
            at_home = at_home or added
        elif hop.state:
            call.wait(h, stop.arrival.transfer)
            stop.passed(stop.total(kind, added))
            stop.arrival.release()
    totals: list[Block] = []
    for stops in routes:
        call.wait(h + 1, stops[-1].arrival.transfer)
        totals.append(stops[-1].total(kind, None if totals else at_home))
    for part in totals[1:]:
        kind.add(totals[0], part)
    call.wait(h + 1, *sends, *(stop.sent for stops in routes for stop in stops))
    return totals[0].arrays


_STRATEGIES = {"pass_kv": _pass_kv, "pass_q": _pass_q, "gather": _gather}

"""The gradient of ring attention: the schedules of the forward pass, with gradients one hop behind their blocks."""

from __future__ import annotations

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..core.intervals import length
from ..transport.consensus import raise_on_all_ranks
from .accumulators import merge_sums
from .blocks import Block
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
            rows = call.kernel.rows(out, lse, dout, dlse)
            fields = call.fields()
        call = call.agreed(GRADIENT, fields)
        with ring.break_ring_on_error():
            strategy = "pass_q" if call.chosen(gradient=True) == "pass_q" else "pass_kv"
            ring.tracer.choose(strategy)
            sums = _STRATEGIES[strategy](call, rows)
            found = call.options.gradients(sums, rows, call.arrays[0].dtype)
            mx.eval(found)
    return found


def _pass_q(call: RingCall, rows: Rows) -> Gradients:
    """Send queries with their rows around the ring, and the gradients of the queries one hop behind."""
    keys = call.keys()
    k, v = call.gradients_of_keys(length(keys.spans))

    def add(h: int, block: Block) -> Arrays:
        nonlocal k, v
        q, *mask = call.gradients_of_queries(length(block.spans))
        found = call.backward_block(h, block, keys, Gradients(q, k, v, *mask))
        k, v = found.k, found.v
        return [x for x in (found.q, found.mask) if x is not None]

    results = accumulator_for(call.links)(call.gradients_of_queries, merge_sums)
    q, *mask = round_trip(call, call.queries(rows), call.schedules(gradient=True), results, add)
    return Gradients(q, k, v, *mask)


def _pass_kv(call: RingCall, rows: Rows) -> Gradients:
    """Send keys and values around the ring, and their gradients one hop behind."""
    queries = call.queries(rows)
    q, *mask = call.gradients_of_queries(length(queries.spans))

    def add(h: int, block: Block) -> Arrays:
        nonlocal q, mask
        found = call.backward_block(
            h, queries, block, Gradients(q, *call.gradients_of_keys(length(block.spans)), *mask)
        )
        q = found.q
        mask = [x for x in (found.mask,) if x is not None]
        return found.k, found.v

    results = accumulator_for(call.links)(call.gradients_of_keys, merge_sums)
    k, v = round_trip(call, call.keys(), call.schedules(gradient=True), results, add)
    return Gradients(q, k, v, *mask)


_STRATEGIES = {"pass_kv": _pass_kv, "pass_q": _pass_q}

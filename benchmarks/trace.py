"""Cost of a trace: calls of 2 ranks with a recorder and without one, in turn."""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import mlx.core as mx

import ringattn as ra
from ringattn.bench.problem import AttentionShape, random_arrays
from ringattn.bench.ranks import together
from ringattn.bench.timing import turns
from ringattn.tracing.spans import NO_TRACER, Event, Recorder

from .common import run_ranks, show, write_result

CALLS = {"ring_attention, 2,048 tokens": 2048, "decode_attention, 1 token": 1}  # name: queries
KEYS = 2048
REPEATS = {2048: 100, 1: 2000}
SPANS = 100_000  # of the loop that times a span


def main() -> None:
    """Measure both calls, and the price of a span."""
    found = run_ranks("benchmarks.trace", 2, 1)
    assert found is not None
    slowest = found[0]
    rows = [
        [name, f"{1e3 * off:.3f}", f"{1e3 * on:.3f}", f"{ratio - 1:+.2%}", spans, f"{1e2 * spans * price / off:.2f} %"]
        for name, (off, on, ratio, spans) in slowest["calls"].items()
        for price in [slowest["on"] - slowest["off"]]
    ]
    head = ["call", "off ms", "on ms", "median of on / off", "spans of a rank", "spans x price of a span"]
    show("a trace on 2 ranks with a thread each (aim: below 1 %)", head, rows)
    print(f"  a span: {1e6 * slowest['on']:.2f} us with a recorder, {1e6 * slowest['off']:.2f} us without one")


def worker() -> None:
    """Measure on one rank: medians of each call, the median of the ratios of neighbours, and the number of spans."""
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        layout = ra.Layout.zigzag(KEYS, ring.size)
        result: dict = {"calls": {}}
        for name, queries in CALLS.items():
            q, k, v = random_arrays(AttentionShape(mx.float32, 128, (8, 2), queries, KEYS, True))
            k, v = (mx.contiguous(layout.shard(x, ring.rank)) for x in (k, v))
            if queries > 1:
                q = mx.contiguous(layout.shard(q, ring.rank))
                call = partial(ra.ring_attention, q, k, v, ring=ring, layout=layout, mask="causal")
            else:
                call = partial(ra.decode_attention, q, k, v, ring=ring, kv_layout=layout)
            result["calls"][name] = _compare(ring, lambda call=call: mx.eval(call()), REPEATS[queries])
        for name, tracer in (("off", NO_TRACER), ("on", Recorder([]))):
            start = time.perf_counter()
            for _ in range(SPANS):
                with tracer.span("compute", 0):
                    pass
            result[name] = (time.perf_counter() - start) / SPANS
        write_result(ring.rank, result)


def _compare(ring, call, repeats: int) -> tuple[float, float, float, int]:
    events: list[Event] = []

    def under(tracer) -> None:
        ring.tracer = tracer
        call()
        ring.tracer = NO_TRACER

    both = {"off": partial(under, NO_TRACER), "on": lambda: under(Recorder(events))}
    found = turns({name: together(ring, one) for name, one in both.items()}, repeats)
    ratio = median(on / off for on, off in zip(found["on"], found["off"]))
    return median(found["off"]), median(found["on"]), ratio, len(events) // repeats


if __name__ == "__main__":
    worker()

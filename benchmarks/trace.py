"""Cost of a trace: pairs of calls on 2 ranks, with a recorder and without one, whose order changes in each pair."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip

from ringattn.bench.problem import AttentionShape, random_arrays
from ringattn.bench.ranks import together
from ringattn.bench.timing import median_interval, turns
from ringattn.tracing.spans import NO_TRACER, Recorder
from ringattn.transport.trace_file import MOST

from .common import run_ranks, show, small_llama, write_result

KEYS = 2048  # tokens
PAIRS = {  # of calls
    "ring_attention, 2,048 tokens, 8/2 heads of 128": 1000,
    "decode_attention, 1 token after 2,048": 30_000,
    "a token of a Llama of 576 x 8 layers after 512": 3000,
}
PROMPT = 512  # tokens that the Llama reads first


def main() -> None:
    """Measure the calls.

    A loop over spans alone would show less than they cost: between two spans of a call a kernel replaces the contents
    of the caches.
    """
    found = run_ranks("benchmarks.trace", 2, 1)
    assert found is not None
    rows = []
    for name, (off, low, middle, high, spans) in found[0].items():
        ratio = f"{middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})"
        rows.append([name, PAIRS[name], f"{1e3 * off:.3f}", ratio, f"{1e6 * off * (middle - 1):.1f}", spans])
    head = ["call", "pairs", "off ms", "median of on / off (95 %)", "us", "spans of a rank"]
    show("a trace on 2 ranks with a thread each (aim: below 1 %)", head, rows)


def worker() -> None:
    """Measure on one rank."""
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        calls = zip(PAIRS, (_prompt(ring), _decode(ring), _token(ring)))
        write_result(ring.rank, {name: _compare(ring, call, PAIRS[name]) for name, call in calls})


def _arrays(ring: ra.Ring, queries: int) -> tuple[ra.Layout, list[mx.array]]:
    layout = ra.Layout.zigzag(KEYS, ring.size)
    q, k, v = random_arrays(AttentionShape(mx.float32, 128, (8, 2), queries, KEYS, True))
    q = layout.shard(q, ring.rank) if queries > 1 else q
    return layout, [mx.contiguous(x) for x in (q, layout.shard(k, ring.rank), layout.shard(v, ring.rank))]


def _prompt(ring: ra.Ring) -> Callable[[], None]:
    layout, arrays = _arrays(ring, KEYS)
    return lambda: mx.eval(ra.ring_attention(*arrays, ring=ring, layout=layout, mask="causal"))


def _decode(ring: ra.Ring) -> Callable[[], None]:
    layout, arrays = _arrays(ring, 1)
    return lambda: mx.eval(ra.decode_attention(*arrays, ring=ring, kv_layout=layout))


def _token(ring: ra.Ring) -> Callable[[], None]:
    """A new token, always after the same context."""
    from mlx_lm.models.cache import trim_prompt_cache
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(small_llama(8)))
    lm.shard(model, ring)
    cache = model.make_cache()
    ids = mx.ones((1, PROMPT), mx.int32)
    mx.eval(model(ids, cache=cache))

    def call() -> None:
        mx.eval(model(ids[:, :1], cache=cache))
        trim_prompt_cache(cache, 1)

    return call


def _compare(ring, call, pairs: int) -> tuple[float, float, float, float, int]:
    """Median seconds without a recorder, median of the ratios of pairs with its interval, and the number of spans."""
    recorder = Recorder(events := deque[tuple](maxlen=MOST), plain=True)

    def under(tracer) -> None:
        ring.tracer = tracer
        call()
        ring.tracer = NO_TRACER

    both = {"off": partial(under, NO_TRACER), "on": partial(under, recorder)}
    both["on"]()
    spans = len(events)
    orders = [{name: together(ring, both[name]) for name in order} for order in (("off", "on"), ("on", "off"))]
    times = [turns(order, 1) for _ in range(pairs // 2) for order in orders]
    ratios = [one["on"][0] / one["off"][0] for one in times]
    low, high = median_interval(ratios)
    return median(one["off"][0] for one in times), low, median(ratios), high, spans


if __name__ == "__main__":
    worker()

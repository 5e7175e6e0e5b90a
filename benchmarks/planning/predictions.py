"""Predicted times, from the rates that the ranks measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

import ringattn as ra
from ringattn.core.masks import Band
from ringattn.planning import Arrangement, Cluster, Job, Link, Machine, ModelShape, predictions
from ringattn.planning.demand import choose
from ringattn.planning.describe import shape_of
from ringattn.planning.hops import Ring, call_timing
from ringattn.planning.shape import attention_shape
from ringattn.ring.schedule import Sizes

from .cases import CALLS, DECODED, LARGE, SHORT, SMALL, THIN, Call, Run, make_model, runs

MEMORY = 1 << 36  # bytes: enough
Rates = Sequence[dict[str, Any]]  # of all ranks


def predict_calls(rates: Rates, link: Link) -> dict[str, float]:
    """Seconds of each call of ring attention."""
    return {call.name: _call(call, [one["calls"][call.name] for one in rates], link) for call in CALLS}


def _call(call: Call, seconds: Sequence[dict[str, float]], link: Link) -> float:
    shape = attention_shape(call.heads, call.kv_heads, call.dim, 4)
    kind = shape.attending[0]
    fitted = [_line(kind.pair_flops, SMALL**2, s["small"], LARGE**2, s["large"]) for s in seconds]
    cut = median(_cut(kind.pair_flops, *line, s["causal"]) for line, s in zip(fitted, seconds))
    flops = np.array([rate for _, rate in fitted])
    ring = Ring(flops, fmean(fixed for fixed, _ in fitted), (link,) * len(seconds), cut)
    spans = list(ra.Layout.zigzag(call.tokens, len(seconds)).spans)
    sizes = Sizes(kind.key), kind.query
    strategy, demand = choose(spans, spans, Band.of(call.mask == "causal", None), *sizes)
    timing = call_timing(ring, demand, sizes[strategy == "pass_q"], kind.pair_flops)
    return float(timing.finish.max()) + ring.exchange()


def predict_models(rates: Rates, link: Link) -> dict[str, tuple[float, float]]:
    """Seconds of the first token and of a further one, of each run, as ``ringattn plan`` predicts them."""
    shape = shape_of("model", make_model())
    thin = shape_of("thin", make_model(**THIN))
    machines = tuple(_machine(one["model"], shape, thin, "") for one in rates)
    alone = tuple(_machine(one["model"], shape, thin, " alone") for one in rates)  # stages read one after the other
    rows = [one["row"] for one in rates if "row" in one]
    row = None
    if rows:
        row = Link("row", min(one["bandwidth"] for one in rows), max(one["latency"] for one in rows) / 2)
    return {
        run.name: _run(shape, Cluster(alone if run.stages > 1 else machines, link, row=row), run)
        for run in runs(len(rates))
        if rows or run.tensor == 1
    }


def _run(shape: ModelShape, cluster: Cluster, run: Run) -> tuple[float, float]:
    size = cluster.size
    wanted = Arrangement(stages=size) if run.stages > 1 else Arrangement(size // run.tensor, run.tensor)
    job = Job(run.tokens, chunk=run.chunk or None, gpu=False)
    found = next(one for one in predictions(shape, cluster, job) if one.arrangement == wanted)
    return found.first, found.token


def _line(unit: float, small: float, first: float, large: float, second: float) -> tuple[float, float]:
    """Constant part in seconds, and operations per second, of two measurements."""
    slope = max(second - first, 1e-9) / (large - small)
    return max(0.0, first - slope * small), unit / slope


def _cut(unit: float, call: float, rate: float, seconds: float) -> float:
    """Seconds of a query on a mask's edge beside its pairs, of a causal call."""
    pairs = LARGE * (LARGE + 1) / 2
    return max(0.0, (seconds - call - pairs * unit / rate) / LARGE)


def _machine(one: dict[str, Any], shape: ModelShape, thin: ModelShape, how: str) -> Machine:
    """The rates of a rank, from kernel calls, two short prompts, and tokens of two models on one rank."""
    kind = shape.attending[0]
    call, attention = _line(kind.pair_flops, SMALL**2, one["small"], LARGE**2, one["large"])
    cut = _cut(kind.pair_flops, call, attention, one["causal"])
    linear = []
    for n in SHORT:  # of which the last token is read alone
        pairs = n * (n - 1) / 2 * kind.pair_flops
        linear.append(one["prompts"][str(n)] - one["token"] - shape.depth * (pairs / attention + call + cut * n))
    fixed, flops = _line(shape.prompt_linear, SHORT[0], linear[0], SHORT[1], linear[1])
    keys = (DECODED[1] - DECODED[0]) * kind.key / max(one["decoded"][1] - one["decoded"][0], 1e-7)
    both = [one[name + how] - SHORT[1] * kind.key * kind.count / keys for name in ("thin", "token")]
    step, bandwidth = _line(1.0, thin.read + thin.head, both[0], shape.read + shape.head, both[1])
    return Machine(
        "host", flops, attention, bandwidth, MEMORY,
        call=call, cut=cut, packed=shape.read / max(fixed, 1e-6), step=step / shape.depth, keys=keys,
    )  # fmt: skip


def ratios(predicted: dict[str, Any], measured: Rates) -> Iterator[tuple[str, float, float]]:
    """Name, predicted and measured seconds of each configuration."""
    for name, seconds in predicted["calls"].items():
        yield f"call, {name}", seconds, max(one["calls"][name] for one in measured)
    for name, both in predicted["models"].items():
        for what, i in (("prompt", 0), ("token after", 1)):
            yield f"{what}, {name}", both[i], max(one["models"][name][i] for one in measured)

"""Predicted times, from the rates that the ranks measured."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import numpy as np

import ringattn as ra
from ringattn.core.masks import Band
from ringattn.planning.decode import token_on_ring
from ringattn.planning.demand import choose
from ringattn.planning.describe import shape_of
from ringattn.planning.hops import Ring, call_timing
from ringattn.planning.links import Link
from ringattn.planning.machines import Machine
from ringattn.planning.prefill import read_on_ring
from ringattn.planning.shape import ModelShape, attention_shape
from ringattn.ring.schedule import Sizes

from .cases import CALLS, CHUNK, DECODES, LARGE, PROMPTS, SHORT, SMALL, make_model


def predict_calls(found: list[dict], link: Link) -> list[tuple[str, float, float]]:
    """Name, predicted and measured seconds of each call, from the results of all ranks."""
    result = []
    for call in CALLS:
        seconds = [one["calls"][call.name] for one in found]
        shape = attention_shape(call.heads, call.kv_heads, call.dim, 4)
        kind = shape.attending[0]
        fitted = [_line(kind.pair_flops, SMALL**2, s["small"], LARGE**2, s["large"]) for s in seconds]
        cut = median(_cut(kind.pair_flops, *line, s["causal"]) for line, s in zip(fitted, seconds))
        rates = np.array([rate for _, rate in fitted])
        ring = Ring(rates, float(np.mean([fixed for fixed, _ in fitted])), (link,) * len(found), cut)
        layout = ra.Layout.zigzag(call.tokens, len(found))
        spans = list(layout.spans)
        sizes = Sizes(kind.key), kind.query
        strategy, demand = choose(spans, spans, Band.of(call.mask == "causal", None), *sizes)
        timing = call_timing(ring, demand, sizes[strategy == "pass_q"], kind.pair_flops)
        measured = max(s["ring"] for s in seconds)
        result.append((f"{call.name}, {strategy}", float(timing.finish.max()) + ring.exchange(), measured))
    return result


def _line(unit: float, small: float, first: float, large: float, second: float) -> tuple[float, float]:
    """Constant part in seconds, and operations per second, of two measurements."""
    slope = max(second - first, 1e-9) / (large - small)
    return max(0.0, first - slope * small), unit / slope


def _cut(unit: float, call: float, rate: float, seconds: float) -> float:
    """Seconds of a query on a mask's edge beside its pairs, of a causal call."""
    pairs = LARGE * (LARGE + 1) / 2
    return max(0.0, (seconds - call - pairs * unit / rate) / LARGE)


def predict_model(found: list[dict], link: Link) -> list[tuple[str, float, float]]:
    """Name, predicted and measured seconds of each prompt and of a token after it, from the results of all ranks."""
    shape = shape_of("llama", make_model())
    kind = shape.attending[0]
    machines = [_machine(one, shape) for one in found]
    links = [link] * len(found)
    weights = [1.0] * len(found)
    latency = median(one["exchange"] for one in found) / DECODES
    ring = Ring(np.array([m.attention for m in machines]), 0.0, (replace(link, latency=latency),) * len(found))
    result = []
    for prompt in PROMPTS:
        reading = read_on_ring(shape, machines, links, prompt, CHUNK, weights)
        measured = max(one["prefill"][str(prompt)] for one in found)
        result.append((f"prompt of {prompt}, {reading.strategy}", reading.seconds, measured))
        token = token_on_ring(shape, [replace(one, layer=0.0) for one in machines], ring, prompt, weights)
        measured = max(one["decode"][str(prompt)] for one in found)
        result.append((f"a token after {prompt}", token, measured))
    assert kind.count == shape.depth
    return result


def _machine(one: dict, shape: ModelShape) -> Machine:
    """The rates of a rank, from a kernel call, two short prompts, and a token after them on one rank."""
    kind = shape.attending[0]
    call, attention = _line(kind.pair_flops, SMALL**2, one["small"], LARGE**2, one["large"])
    cut = _cut(kind.pair_flops, call, attention, one["causal"])
    linear = []
    for n in SHORT:
        pairs = n * (n + 1) / 2 * kind.pair_flops
        linear.append(one["alone"][str(n)] - shape.depth * (pairs / attention + call + cut * n))
    fixed, flops = _line(shape.linear, SHORT[0], linear[0], SHORT[1], linear[1])
    keys = SHORT[1] * kind.key * kind.count
    return Machine(  # its bandwidth contains all of a token's work beside the keys
        "host", flops, attention, (shape.read + shape.head) / max(one["token"] - keys / one["keys"], 1e-6), 0.0,
        call=call, cut=cut, layer=fixed / shape.depth, keys=one["keys"],
    )  # fmt: skip

"""Times that `ringattn plan` predicts against times measured, on virtual hosts with a core each.

sudo python -m benchmarks planning

On each network the ranks first measure their rates: one kernel call of two sizes, a short prompt on one rank, a new
token at a short context, a small message, and a block that all ranks send at once. The configurations to predict are
others: longer, over several ranks, with other heads and masks. Rates and configurations take turns, so that other work
on the machine affects both. Where hosts share a core, the rates are measured while all of them compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip
import numpy as np

from launch.virtual import Cluster, unavailable
from ringattn.bench.timing import turns
from ringattn.core.masks import Band
from ringattn.doctor.link_speed import measure_hop, measure_link, pairs
from ringattn.planning.decode import token_on_ring
from ringattn.planning.demand import choose
from ringattn.planning.describe import shape_of
from ringattn.planning.hops import Ring, call_timing
from ringattn.planning.links import Link
from ringattn.planning.machines import Machine
from ringattn.planning.prefill import read_on_ring
from ringattn.planning.shape import attention_shape
from ringattn.ring.call import check_ring

from .common import run_ranks, show, write_result

AIM = 0.15
SMALL, LARGE = 384, 1024  # tokens of the calls by which the rates are measured
SHORT = (256, 512)  # tokens of the prompts by which the rates are measured
CHUNK = 512  # tokens of a rank in a round
DECODES = 8  # calls in a row
STEPS = 6  # new tokens
REPEATS = 4
CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
}


class Call(NamedTuple):
    """A call of ring attention: its tokens, heads and mask."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    mask: str

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, {self.heads}/{self.kv_heads} x {self.dim}, {self.mask}"


CALLS = (
    Call(4096, 8, 8, 64, "causal"),
    Call(4096, 8, 2, 128, "full"),
    Call(6144, 8, 2, 64, "causal"),
    Call(3072, 4, 4, 128, "full"),
)
PROMPTS = (1024, 3072)  # tokens; a new token follows
NETWORKS = ((2, None), (2, "1gbit"), (2, "200mbit"), (2, "60mbit"), (3, "400mbit"), (4, "400mbit"))


def main() -> None:
    """Measure, predict and print, for each network."""
    if why := unavailable():
        print(f"\nplanning: skipped: {why}")
        return
    free_work = None
    rows = []
    ratios = []
    for hosts, rate in NETWORKS:
        with Cluster(hosts, rate=rate, cores=1) as cluster:
            for what in ("attention", "model"):
                if what == "model" and hosts > 2:
                    continue
                options = {"hosts": cluster.addresses, "base": cluster.environment}
                found = run_ranks("benchmarks.planning", hosts, 1, what, **options)
                assert found is not None
                if rate is None:  # without a limit a message costs nothing but the cores' work
                    free_work = 1 / (2 * found[0]["bandwidth"])
                for name, predicted, measured in _compare(what, found, free_work or 0.0):
                    ratios.append(predicted / measured)
                    print(f"  {hosts} hosts, {rate}: {name}: {ratios[-1]:.2f}", file=sys.stderr, flush=True)
                    rows.append(
                        [hosts, rate or "free", name, f"{predicted:.3f}", f"{measured:.3f}", f"{ratios[-1]:.2f}"]
                    )
    head = ["hosts", "links", "what", "predicted, s", "measured, s", "ratio"]
    show("Predicted and measured, float32, a core a host (4 hosts share 2 cores)", head, rows)
    within = sum(abs(ratio - 1) <= AIM for ratio in ratios)
    print(f"  {within} of {len(ratios)} within {AIM:.0%} (aim: at least 12); median ratio {median(ratios):.2f}")


def _compare(what: str, found: list[dict], work: float) -> list[tuple[str, float, float]]:
    """Name, predicted and measured seconds of each configuration of one network."""
    link = Link("measured", found[0]["bandwidth"], found[0]["latency"], work)
    return _predict_calls(found, link) if what == "attention" else _predict_model(found, link)


def _predict_calls(found: list[dict], link: Link) -> list[tuple[str, float, float]]:
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
        sizes = ra_sizes(kind)
        strategy, demand = choose(spans, spans, Band.of(call.mask == "causal", None), *sizes)
        timing = call_timing(ring, demand, sizes[strategy == "pass_q"], kind.pair_flops)
        measured = max(s["ring"] for s in seconds)
        result.append((f"{call.name}, {strategy}", float(timing.finish.max()) + ring.exchange(), measured))
    return result


def ra_sizes(kind):
    """Sizes of a key and of a query that travel."""
    from ringattn.ring.schedule import Sizes

    return Sizes(kind.key), kind.query


def _line(unit: float, small: float, first: float, large: float, second: float) -> tuple[float, float]:
    """Constant part in seconds, and operations per second, of two measurements."""
    slope = max(second - first, 1e-9) / (large - small)
    return max(0.0, first - slope * small), unit / slope


def _cut(unit: float, call: float, rate: float, seconds: float) -> float:
    """Seconds of a query on a mask's edge beside its pairs, of a causal call."""
    pairs = LARGE * (LARGE + 1) / 2
    return max(0.0, (seconds - call - pairs * unit / rate) / LARGE)


def _predict_model(found: list[dict], link: Link) -> list[tuple[str, float, float]]:
    shape = shape_of("llama", _model())
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


def _machine(one: dict, shape) -> Machine:
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


def _model():
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    return Model(ModelArgs.from_dict(CONFIG))


def worker() -> None:
    """Measure on one rank."""
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        link = [measure_link(check_ring(ring), two) for two in pairs(ring.size)]
        own = [one.latency for one in link if one is not None]
        latency = float(ring.all_reduce(mx.array([max(own)])).item()) / ring.size
        result = {"latency": latency, "bandwidth": measure_hop(check_ring(ring))}
        result |= _time_calls(ring) if sys.argv[2] == "attention" else _time_model(ring)
        write_result(ring.rank, result)


def _together(ring: ra.Ring, work: Callable[[], object]) -> Callable[[], None]:
    """Start on all ranks at once, and include the wait for the last one."""

    def call() -> None:
        work()
        ring.barrier()

    return call


def _random(*shape: int) -> mx.array:
    x = mx.random.normal(shape)
    mx.eval(x)
    return x


def _time_calls(ring: ra.Ring) -> dict:
    found = {}
    for call in CALLS:
        layout = ra.Layout.zigzag(call.tokens, ring.size)
        n = layout.local_length(ring.rank)
        local = [_random(1, heads, n, call.dim) for heads in (call.heads, call.kv_heads, call.kv_heads)]
        mask = "causal" if call.mask == "causal" else None

        def attend(local=local, layout=layout, mask=mask) -> None:
            mx.eval(ra.ring_attention(*local, ring=ring, layout=layout, mask=mask))

        whole = [_random(1, heads, LARGE, call.dim) for heads in (call.heads, call.kv_heads, call.kv_heads)]

        def alone(tokens: int, mask: str | None = None, whole=whole) -> None:
            mx.eval(ra.attention(*(x[:, :, :tokens] for x in whole), mask=mask))

        calls = {
            "small": lambda alone=alone: alone(SMALL),
            "large": lambda alone=alone: alone(LARGE),
            "causal": lambda alone=alone: alone(LARGE, "causal"),
            "ring": attend,
        }
        timed = turns({name: _together(ring, work) for name, work in calls.items()}, REPEATS + 1)
        found[call.name] = {name: median(seconds[1:]) for name, seconds in timed.items()}
    return {"calls": found}


def _decode(ring: ra.Ring, local: list[mx.array]) -> None:
    """Attend from one token to a few keys, so that the exchange of states takes most of the time."""
    layout = ra.Layout.contiguous(SMALL, ring.size)
    q, *keys = local
    own = [x[:, :, : layout.local_length(ring.rank)] for x in keys]
    for _ in range(DECODES):
        mx.eval(ra.decode_attention(q[:, :, :1], *own, ring=ring, kv_layout=layout))


def _time_model(ring: ra.Ring) -> dict:
    from mlx.utils import tree_map

    model = _model()
    mx.eval(model.parameters())
    lm.shard(model, ring)
    ids = mx.random.randint(0, CONFIG["vocab_size"], (1, max(PROMPTS)))
    solo = _model()
    mx.eval(solo.parameters())
    lm.shard(solo, ra.init("solo"))

    def read(model, tokens: int, step: int) -> list:
        cache = model.make_cache()
        for start in range(0, tokens, step):
            model(ids[:, start : min(start + step, tokens)], cache=cache)
            mx.eval(tree_map(lambda one: one.state, cache))
        return cache

    heads, kv_heads, dim = (CONFIG[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    local = [_random(1, h, LARGE, dim) for h in (heads, kv_heads, kv_heads)]

    def attend(queries: int, tokens: int, mask: str | None = None) -> None:
        mx.eval(ra.attention(local[0][:, :, :queries], *(x[:, :, :tokens] for x in local[1:]), mask=mask))

    calls = {"small": lambda: attend(SMALL, SMALL), "large": lambda: attend(LARGE, LARGE)}
    calls["causal"] = lambda: attend(LARGE, LARGE, "causal")
    calls |= {f"one {n}": lambda n=n: attend(1, n) for n in (SMALL, LARGE)}
    calls |= {f"solo {n}": lambda n=n: read(solo, n, n) for n in SHORT}
    calls |= {f"ring {n}": lambda n=n: read(model, n, CHUNK * ring.size) for n in PROMPTS}
    calls |= {f"decode {one.size}": lambda one=one: _decode(one, local) for one in (ra.init("solo"), ring)}
    timed = turns({name: _together(ring, work) for name, work in calls.items()}, REPEATS + 1)
    seconds = {name: median(times[1:]) for name, times in timed.items()}

    runs = {"token": (solo, SHORT[1], SHORT[1]), **{str(n): (model, n, CHUNK * ring.size) for n in PROMPTS}}
    caches = {name: (run[0], read(*run)) for name, run in runs.items()}

    def step(name: str) -> None:
        run, cache = caches[name]
        mx.eval(run(ids[:, :1], cache=cache))

    tokens = {
        name: median(times[2:])
        for name, times in turns({name: lambda name=name: step(name) for name in caches}, STEPS + 2).items()
    }
    key = 2 * kv_heads * dim * 4
    keys = (LARGE - SMALL) * key / max(seconds[f"one {LARGE}"] - seconds[f"one {SMALL}"], 1e-7)
    return {
        "small": seconds["small"],
        "large": seconds["large"],
        "causal": seconds["causal"],
        "keys": keys,
        "alone": {n: seconds[f"solo {n}"] for n in SHORT},
        "exchange": max(0.0, seconds[f"decode {ring.size}"] - seconds["decode 1"]),
        "token": tokens.pop("token"),
        "prefill": {n: seconds[f"ring {n}"] for n in PROMPTS},
        "decode": tokens,
    }


if __name__ == "__main__":
    worker()

"""One rank: measures rates, checks the answers of the configurations, and times them in turn with the rates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip

from ringattn.bench.problem import AttentionShape, random_arrays, sampled_error
from ringattn.bench.timing import turns
from ringattn.doctor.link_speed import measure_hop, measure_link, pairs
from ringattn.ring.call import check_ring

from ..common import write_result
from .cases import CALLS, CHUNK, CONFIG, DECODES, LARGE, PROMPTS, REPEATS, SHORT, SMALL, STEPS, Call, make_model

MOST = 1e-4  # difference of logits, of the largest


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
        calls = _calls(ring, call)
        timed = turns({name: _together(ring, work) for name, work in calls.items()}, REPEATS + 1)
        found[call.name] = {name: median(seconds[1:]) for name, seconds in timed.items()}
    return {"calls": found}


def _calls(ring: ra.Ring, call: Call) -> dict[str, Callable[[], object]]:
    """A call of ring attention, whose answer was checked, and those by which the rates are measured."""
    layout = ra.Layout.zigzag(call.tokens, ring.size)
    shape = AttentionShape(
        mx.float32, call.dim, (call.heads, call.kv_heads), call.tokens, call.tokens, call.mask == "causal"
    )
    whole = random_arrays(shape)
    local = [mx.contiguous(layout.shard(x, ring.rank)) for x in whole]
    short = [mx.contiguous(x[:, :, :LARGE]) for x in whole]
    mx.eval(local, short)

    def attend() -> mx.array:
        out = ra.ring_attention(*local, ring=ring, layout=layout, mask=shape.mask)
        mx.eval(out)
        return out

    def alone(tokens: int, mask: str | None = None) -> None:
        mx.eval(ra.attention(*(x[:, :, :tokens] for x in short), mask=mask))

    error = sampled_error(shape, (local[0], *whole[1:]), layout.positions(ring.rank), attend(), None)
    assert error <= 1, f"{call.name}: {error:.3g} of the allowed error"
    return {
        "small": lambda: alone(SMALL),
        "large": lambda: alone(LARGE),
        "causal": lambda: alone(LARGE, "causal"),
        "ring": attend,
    }


def _decode(ring: ra.Ring, local: list[mx.array]) -> None:
    """Attend from one token to a few keys, so that the exchange of states takes most of the time."""
    layout = ra.Layout.contiguous(SMALL, ring.size)
    q, *keys = local
    own = [x[:, :, : layout.local_length(ring.rank)] for x in keys]
    for _ in range(DECODES):
        mx.eval(ra.decode_attention(q[:, :, :1], *own, ring=ring, kv_layout=layout))


def _time_model(ring: ra.Ring) -> dict:
    from mlx.utils import tree_map

    model = make_model()
    mx.eval(model.parameters())
    ids = mx.random.randint(0, CONFIG["vocab_size"], (1, max(PROMPTS)))
    expected = model(ids[:, : PROMPTS[0]])[:, -1:]
    mx.eval(expected)
    lm.shard(model, ring)
    solo = make_model()
    mx.eval(solo.parameters())
    lm.shard(solo, ra.init("solo"))

    def read(model, tokens: int, step: int) -> tuple[mx.array, list]:
        cache = model.make_cache()
        for start in range(0, tokens, step):
            logits = model(ids[:, start : min(start + step, tokens)], cache=cache)
            mx.eval(tree_map(lambda one: one.state, cache))
        return logits[:, -1:], cache

    logits, _ = read(model, PROMPTS[0], CHUNK * ring.size)
    if ring.rank == ring.size - 1:  # it has the last token
        assert mx.abs(logits - expected).max() < MOST * mx.abs(expected).max(), "the ring's logits are not mlx-lm's"

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
    caches = {name: (run[0], read(*run)[1]) for name, run in runs.items()}

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

"""Rates of a rank, its link and its row, measured while all ranks do the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

from ringattn.bench.ranks import together
from ringattn.bench.timing import turns
from ringattn.doctor.link_speed import measure_hop
from ringattn.doctor.row_speed import measure_row
from ringattn.ring.call import check_ring

from .cases import CALLS, CONFIG, DECODED, DECODES, LARGE, REPEATS, SHORT, SMALL, STEPS, THIN, make_model
from .runs import make_ids, read


def measure(ring: ra.Ring) -> dict[str, Any]:
    """Rates of this rank. Collective."""
    found = {
        "bandwidth": measure_hop(check_ring(ring)),
        "calls": {call.name: _kernel(ring, call.heads, call.kv_heads, call.dim) for call in CALLS},
        "model": _model(ring),
        "exchange": _exchange(ring),
    }
    if ring.size % 2 == 0:
        with ra.grid(ring, 2) as grid:
            row = measure_row(grid)
            found["row"] = {"latency": row.latency, "bandwidth": row.bandwidth}
    return found


def _medians(ring: ra.Ring, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    timed = turns({name: together(ring, call) for name, call in calls.items()}, REPEATS + 1)
    return {name: median(seconds[1:]) for name, seconds in timed.items()}


def _kernel(ring: ra.Ring, heads: int, kv_heads: int, dim: int) -> dict[str, float]:
    """Seconds of kernel calls of two sizes, and of a causal one."""
    q, k, v = (mx.random.normal((1, h, LARGE, dim)) for h in (heads, kv_heads, kv_heads))
    mx.eval(q, k, v)

    def attend(queries: int, tokens: int, mask: str | None = None) -> None:
        mx.eval(ra.attention(q[:, :, :queries], k[:, :, :tokens], v[:, :, :tokens], mask=mask))

    return _medians(
        ring,
        {
            "small": partial(attend, SMALL, SMALL),
            "large": partial(attend, LARGE, LARGE),
            "causal": partial(attend, LARGE, LARGE, "causal"),
        },
    )


def _model(ring: ra.Ring) -> dict[str, Any]:
    """Seconds of kernel calls with the model's heads, and of short prompts and a token on one rank."""
    model = make_model()
    mx.eval(model.parameters())
    lm.shard(model, ra.init("solo"))
    ids = make_ids()
    prompts = _medians(ring, {str(n): lambda n=n: read(model, ids[:, :n], n) for n in SHORT})
    thin = make_model(**THIN)
    mx.eval(thin.parameters())
    lm.shard(thin, ra.init("solo"))
    step, thin_step = (_stepping(one, ids[:, : SHORT[1]]) for one in (model, thin))
    tokens = turns({"token": together(ring, step), "thin": together(ring, thin_step)}, STEPS + 2)
    heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    dim = CONFIG["hidden_size"] // heads
    kernel = _kernel(ring, heads, kv_heads, dim)
    return {
        "prompts": prompts,
        "token": median(tokens["token"][2:]),
        "thin": median(tokens["thin"][2:]),
        "token alone": _alone(ring, step),
        "thin alone": _alone(ring, thin_step),
        "decoded": _decoded(ring, heads, kv_heads, dim),
        **kernel,
    }


def _stepping(model: nn.Module, ids: mx.array) -> Callable[[], None]:
    """A token after a prompt."""
    cache = read(model, ids, ids.shape[1])[1]
    return lambda: mx.eval(model(ids[:, :1], cache=cache))


def _alone(ring: ra.Ring, step: Callable[[], None]) -> float:
    """Seconds of a step on this rank while the others wait: hosts on one machine share its memory's bandwidth."""
    found = 0.0
    for rank in range(ring.size):
        if rank == ring.rank:
            found = median(turns({"": step}, STEPS)[""][2:])
        ring.barrier()
    return found


def _decoded(ring: ra.Ring, heads: int, kv_heads: int, dim: int) -> list[float]:
    """Seconds of attention from one token to so many keys of a cache."""
    q, k, v = (mx.random.normal((1, h, DECODED[1], dim)) for h in (heads, kv_heads, kv_heads))
    mx.eval(q, k, v)
    calls = {str(n): lambda n=n: mx.eval(ra.attention(q[:, :, :1], k[:, :, :n], v[:, :, :n])) for n in DECODED}
    seconds = _medians(ring, calls)
    return [seconds[str(n)] for n in DECODED]


def _exchange(ring: ra.Ring) -> float:
    """Seconds that decoding over the ring takes in each layer beside attention."""
    layout = ra.Layout.contiguous(SMALL, ring.size)
    q, k, v = (mx.random.normal((1, h, SMALL, 64)) for h in (12, 4, 4))
    mx.eval(q, k, v)

    def decode(over: ra.Ring) -> None:
        own = [x[:, :, : layout.local_length(ring.rank)] for x in (k, v)]
        where = layout if over.size > 1 else ra.Layout.contiguous(layout.local_length(ring.rank), 1)
        for _ in range(DECODES):
            mx.eval(ra.decode_attention(q[:, :, :1], *own, ring=over, kv_layout=where))

    seconds = _medians(ring, {"ring": partial(decode, ring), "solo": partial(decode, ra.init("solo"))})
    return max(1e-6, (seconds["ring"] - seconds["solo"]) / DECODES)

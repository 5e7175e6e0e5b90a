"""The configurations on one rank: their answers are checked, then they are timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

from ringattn.bench.problem import AttentionShape, random_arrays, sampled_error
from ringattn.bench.ranks import together
from ringattn.bench.timing import turns
from ringattn.lm.rounds import agree_on_round
from ringattn.lm.shard import everyone_of
from ringattn.planning.choice import Job, pipeline_chunk

from .cases import CALLS, CONFIG, PROMPTS, STEPS, TURNS, Call, Run, make_model, runs

MOST = 1e-4  # difference of log-probabilities, of the largest

Answer = tuple[float, float, mx.array]  # seconds of the first token and of a further one, first log-probabilities


def make_ids() -> mx.array:
    """The tokens of the prompts ``[1, tokens]``."""
    return mx.random.randint(0, CONFIG["vocab_size"], (1, max(PROMPTS)), key=mx.random.key(1))


def read(model: nn.Module, ids: mx.array, step: int) -> tuple[mx.array, list]:
    """The log-probabilities after a prompt that is read in rounds of `step` tokens, and the cache.

    As in mlx-lm, the last token is read alone, and before it nothing is evaluated but the cache.
    """
    cache = model.make_cache()
    most = ids.shape[1] - 1
    for one in cache:
        one.unread = most
    for start in range(0, most, step):
        model(ids[:, start : min(start + step, most)], cache=cache)
        mx.eval([one.state for one in cache])
    last = model(ids[:, -1:], cache=cache)[0, -1]
    found = last - mx.logsumexp(last)
    mx.eval(found)
    return found, cache


def time_calls(ring: ra.Ring) -> dict[str, float]:
    """Seconds of each call of ring attention. Collective."""
    calls = {call.name: together(ring, _attend(ring, call)) for call in CALLS}
    return {name: median(seconds[1:]) for name, seconds in turns(calls, TURNS + 1).items()}


def _attend(ring: ra.Ring, call: Call) -> Callable[[], mx.array]:
    layout = ra.Layout.zigzag(call.tokens, ring.size)
    shape = AttentionShape(
        mx.float32, call.dim, (call.heads, call.kv_heads), call.tokens, call.tokens, call.mask == "causal"
    )
    whole = random_arrays(shape)
    local = [mx.contiguous(layout.shard(x, ring.rank)) for x in whole]
    mx.eval(local)

    def attend() -> mx.array:
        out = ra.ring_attention(*local, ring=ring, layout=layout, mask=shape.mask)
        mx.eval(out)
        return out

    error = sampled_error(shape, (local[0], *whole[1:]), layout.positions(ring.rank), attend(), None)
    assert error <= 1, f"{call.name}: {error:.3g} of the allowed error"
    return attend


def time_models(ring: ra.Ring, *, staged: bool) -> dict[str, tuple[float, float]]:
    """Seconds of the first token and of a further one, of each run of a model. Collective.

    A model in stages changes the attention of its class, so that it needs processes of its own.
    """
    ids = make_ids()
    plain = make_model()
    logits = plain(ids[:, : PROMPTS[0]])[0, -1]
    expected = logits - mx.logsumexp(logits)
    mx.eval(expected)
    del plain
    found = {}
    with ExitStack() as stack:
        grid = stack.enter_context(ra.grid(ring, 2)) if ring.size % 2 == 0 else None
        own = [run for run in runs(ring.size) if (run.stages > 1) is staged and (grid or run.tensor == 1)]
        ways = {way: _way(ring, grid, *way) for way in dict.fromkeys((run.tensor, run.stages) for run in own)}
        for run in own:
            answers = [_timed(ring, ways[run.tensor, run.stages], run, ids) for _ in range(TURNS + 1)]
            _check(ring, run, answers[0][2], expected)
            found[run.name] = tuple(median(answer[i] for answer in answers[1:]) for i in (0, 1))
    return found


def _timed(ring: ra.Ring, way: Callable[[Run, mx.array], Answer], run: Run, ids: mx.array) -> Answer:
    ring.barrier()
    answer = way(run, ids[:, : run.tokens])
    ring.barrier()
    return answer


def _check(ring: ra.Ring, run: Run, found: mx.array, expected: mx.array) -> None:
    if run.tokens == PROMPTS[0] and found.size:
        apart = float(mx.abs(found - expected).max() / mx.abs(expected).max())
        assert apart < MOST, f"{run.name}, rank {ring.rank}: log-probabilities differ by {apart:.1e} of the largest"


def _way(ring: ra.Ring, grid: ra.Grid | None, tensor: int, stages: int) -> Callable[[Run, mx.array], Answer]:
    """The function that reads a prompt with a model that is divided in one way."""
    model = make_model()
    if stages > 1:
        return _pipeline(model, grid)
    lm.shard(model, ring if tensor == 1 else grid)
    mx.eval(model.parameters())
    return lambda run, ids: _sharded(model, run, ids)


def _sharded(model: nn.Module, run: Run, ids: mx.array) -> Answer:
    step = run.chunk * model.ring.size or agree_on_round(model, everyone_of(model), 0, run.tokens)
    start = time.perf_counter()
    logprobs, cache = read(model, ids, step)
    times = [time.perf_counter()]
    for _ in range(STEPS):
        mx.eval(model(ids[:, :1], cache=cache))
        times.append(time.perf_counter())
    token = median(b - a for a, b in zip(times[1:], times[2:]))
    return times[0] - start, token, logprobs


def _pipeline(model: nn.Module, grid: ra.Grid) -> Callable[[Run, mx.array], Answer]:
    from ..rivals.lm.models import use_fused_attention
    from ..rivals.lm.pipelined import Pipeline

    use_fused_attention(model)
    pipeline = Pipeline(model, grid.row)
    mx.eval(model.parameters())

    def generate(run: Run, ids: mx.array) -> Answer:
        times = [time.perf_counter()]
        first = None
        for _, logprobs in pipeline.generate(ids[0], STEPS, pipeline_chunk(Job(run.tokens), 2)):
            first = logprobs if first is None else first
            times.append(time.perf_counter())
        token = median(b - a for a, b in zip(times[1:], times[2:]))
        return times[1] - times[0], token, first

    return generate

"""Attention over a sequence spread over the ranks of a ring: where a schedule, a transport and a kernel meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx

from .comm.agreement import agree, heard
from .comm.base import Ring
from .gradient import Gradients, Rows
from .graph import opaque, start_evaluation
from .job import Job, check_ring
from .layout import Layout
from .merge import State, finish
from .results import Kind, add_states, add_sums, post
from .schedule import Schedule
from .spans import length
from .wire import Block, by_turns, collect, relay
from .wire import rows as rows_of

WHAT = "ring_attention"
GRADIENT = f"the gradient of {WHAT}"

Arrays = Sequence[mx.array]


def ring_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    mask: str | mx.array | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    segments: mx.array | tuple[mx.array, mx.array] | None = None,
    strategy: str | None = None,
    return_lse: bool = False,
    out_dtype: mx.Dtype | None = None,
    backend: str | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Exact attention of this rank's queries to the keys of all ranks. Collective: every rank calls it.

    Key and value blocks (or queries and their states) travel around the ring while each rank computes on what it
    holds; memory per rank is its own tensors and two travelling blocks. The result is that of `attention` on the whole
    sequence, and the same bits on every run. What is not said here is as in `attention`.

    Differentiable (mx.grad, mx.vjp) in q, k, v, sinks and an additive mask, through `out` and through the lse. The
    gradient is collective too and that of the sum of all ranks' losses: that by k and v arrives at the rank that has
    them, that by sinks is this rank's queries' part. A rank whose loss does not use the result leaves the others
    waiting; `ringattn.training.mean_loss` keeps the link.

    Args:
        q: This rank's queries ``[batch, heads, local tokens, head_dim]``, in the order of ``layout.positions(rank)``.
        k: This rank's keys ``[batch, kv heads, local tokens, head_dim]``, in the order of `kv_layout`.
        v: This rank's values ``[batch, kv heads, local tokens, value head_dim]``.
        ring: The ring, of `init`.
        layout: Which positions each rank's queries have. The same on every rank, as all that follows but arrays.
        kv_layout: Which positions each rank's keys have. Default: `layout`. It differs where new queries meet a
            longer cached prefix; `layout` then starts at the prefix's length.
        scale, window, softcap, sinks, out_dtype, backend: As in `attention`; windows look at positions.
        mask: ``"causal"`` (by positions), or an array whose rows are this rank's queries and whose columns are the
            keys of all ranks in global order.
        segments: The ids of this rank's tokens ``[batch, local tokens]``, or a pair of them for queries and keys.
        strategy: ``"pass_kv"`` moves keys and values; ``"pass_q"`` moves queries and brings their states home, which
            is less for few new queries against a long cache; ``"gather"`` brings all keys that this rank's queries
            see to it and computes once: its memory grows with the whole sequence. ``None`` takes whichever of the
            first two moves fewer bytes.
        return_lse: Also return the log-sum-exp.

    Returns:
        `out` ``[batch, heads, local tokens, value head_dim]`` for this rank's queries, or ``(out, lse)``.

    Raises:
        ArgumentError: An argument is wrong on this or another rank, or differs between ranks. Raised on every rank,
            before any data moves; the ring still works.
        RingError: A rank died, stalled or left, or another thread is using the ring.
        TransformError: mx.compile, mx.vmap, mx.jvp or a second derivative reached it: not supported.
    """
    check_ring(ring)
    with ring.call(WHAT):
        with heard(ring, WHAT):
            job = Job.checked(
                ring,
                layout,
                kv_layout,
                q,
                k,
                v,
                strategy=strategy,
                return_lse=return_lse,
                backend=backend,
                scale=scale,
                mask=mask,
                window=window,
                softcap=softcap,
                sinks=sinks,
                segments=segments,
                out_dtype=out_dtype,
            )
        out, lse = opaque(
            WHAT,
            lambda *arrays: _run(job.bind(arrays)),
            job.arrays,
            gradient=lambda *arrays: _pull_back(job.bind(arrays[:-4]), *arrays[-4:]),
        )
    return (out, lse) if return_lse else out


def _run(job: Job) -> tuple[mx.array, mx.array]:
    """Agree with the other ranks, run the schedule, finish."""
    with heard(job.ring, WHAT):
        # Keys and values first and alone: the first send needs them, and must not wait for other arithmetic.
        mx.eval(*job.keys().arrays)
        start_evaluation(*job.arrays)
        fields = job.fields()
    agree(job.ring, WHAT, fields)
    with job.ring.committed():
        state = _STRATEGIES[job.chosen()](job)
        out, lse = finish(state, job.options.sinks, job.options.out_dtype)
        del state
        mx.eval(out, lse)
    return out, lse


def _pull_back(job: Job, dout: mx.array, dlse: mx.array, out: mx.array, lse: mx.array) -> list[mx.array]:
    """The gradients by `job.arrays`, with the other ranks."""
    ring = job.ring
    with ring.call(GRADIENT):
        with heard(ring, GRADIENT):
            mx.eval(*job.arrays, dout, dlse)
            rows = job.kernel.rows(out, lse, dout, dlse)
            fields = job.fields()
        agree(ring, GRADIENT, fields)
        with ring.committed():
            sums = (_pull_back_queries if job.chosen(gradient=True) == "pass_q" else _pull_back_keys)(job, rows)
            found = job.options.gradients(sums, rows, job.arrays[0].dtype)
            mx.eval(found)
    return found


def _pass_kv(job: Job) -> State:
    """Keys and values travel; the state of this rank's queries is carried from hop to hop."""
    arrivals, sends = relay(job.ring, job.keys(), job.schedules())
    queries, state, h = job.queries(), None, 0
    for h, hop, arrival in arrivals:
        job.ring.at(WHAT, h)
        if hop.compute:
            job.wait(h, arrival.transfer)
            state = job.attend(h, queries, arrival.block, state)
        arrival.release()
    job.wait(h + 1, *sends)
    return job.empty_state(job.arrays[0].shape[2]) if state is None else state


def _gather(job: Job) -> State:
    """Keys and values travel to all ranks whose queries see them, and each computes once."""
    schedules = job.schedules()
    whole = collect(job.ring, job.keys(), schedules)
    hops = max(len(schedule.hops) for schedule in schedules)
    job.ring.at(WHAT, hops)
    return job.attend(hops, job.queries(), whole, None)


def _pass_q(job: Job) -> State:
    """Queries travel, and their states one hop behind; each rank adds what its own keys contribute."""
    keys = job.keys()

    def add(h: int, block: Block) -> State:
        return job.attend(h, block, keys, None)

    return State(*_round_trip(job, job.queries(), job.schedules(), Kind(job.empty_state, add_states), add))


def _pull_back_queries(job: Job, rows: Rows) -> Gradients:
    """Queries travel with what the gradient needs of them, and their own gradients one hop behind."""
    keys = job.keys()
    k, v = job.gradients_of_keys(length(keys.spans))

    def add(h: int, block: Block) -> Arrays:
        nonlocal k, v
        q, *mask = job.gradients_of_queries(length(block.spans))
        found = job.pull_back(h, block, keys, Gradients(q, k, v, *mask))
        k, v = found.k, found.v
        return [x for x in (found.q, found.mask) if x is not None]

    results = Kind(job.gradients_of_queries, add_sums)
    q, *mask = _round_trip(job, job.queries(rows), job.schedules(gradient=True), results, add)
    return Gradients(q, k, v, *mask)


def _pull_back_keys(job: Job, rows: Rows) -> Gradients:
    """Keys and values travel, and their own gradients one hop behind."""
    queries = job.queries(rows)
    q, *mask = job.gradients_of_queries(length(queries.spans))

    def add(h: int, block: Block) -> Arrays:
        nonlocal q, mask
        found = job.pull_back(h, queries, block, Gradients(q, *job.gradients_of_keys(length(block.spans)), *mask))
        q, mask = found.q, [x for x in (found.mask,) if x is not None]
        return found.k, found.v

    results = Kind(job.gradients_of_keys, add_sums)
    k, v = _round_trip(job, job.keys(), job.schedules(gradient=True), results, add)
    return Gradients(q, k, v, *mask)


def _round_trip(
    job: Job, own: Block, schedules: Sequence[Schedule], kind: Kind, compute: Callable[[int, Block], Arrays]
) -> tuple[mx.array, ...]:
    """`own` travels, and its results one hop behind; each rank adds what it computes, and they come home."""
    arrivals, sends = relay(job.ring, own, schedules)
    routes = [post(job.ring, schedule, kind) for schedule in schedules]
    at_home: Block | None = None
    h = 0
    for (h, hop, arrival), (stop, following) in zip(arrivals, by_turns(map(pairwise, routes))):
        job.ring.at(WHAT, h)
        added = None
        if hop.compute:
            job.wait(h, arrival.transfer)
            added = kind.block(compute(h, rows_of(arrival.block, hop.compute)), hop.compute)
        arrival.release()
        following.due()
        if h == 0:
            at_home = at_home or added
        elif hop.state:
            job.wait(h, stop.arrival.transfer)
            stop.passed(stop.total(kind, added))
            stop.arrival.release()
    totals: list[Block] = []
    for stops in routes:
        job.wait(h + 1, stops[-1].arrival.transfer)
        totals.append(stops[-1].total(kind, None if totals else at_home))
    for part in totals[1:]:
        kind.add(totals[0], part)
    job.wait(h + 1, *sends, *(stop.sent for stops in routes for stop in stops))
    return totals[0].arrays


_STRATEGIES = {"pass_kv": _pass_kv, "pass_q": _pass_q, "gather": _gather}

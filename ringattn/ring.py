"""Attention over a sequence spread over the ranks of a ring: where a schedule, a transport and a kernel meet."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .comm.agreement import agree, heard
from .comm.base import Ring
from .graph import opaque, start_evaluation
from .job import Job, check_ring
from .layout import Layout
from .merge import State, finish, merge_states
from .schedule import Schedule
from .spans import Spans, length, locate, positions
from .wire import Arrival, Block, Slots, collect, relay, rows

WHAT = "ring_attention"
STATES = 4096  # tags of states; those of blocks are their hop


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
        TransformError: mx.grad, mx.compile, mx.vmap or mx.jvp reached it: not supported.
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
        out, lse = opaque(WHAT, lambda *arrays: _run(job.bind(arrays)), job.arrays)
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
        state = _STRATEGIES[job.chosen](job)
        out, lse = finish(state, job.options.sinks, job.options.out_dtype)
        del state
        mx.eval(out, lse)
    return out, lse


def _pass_kv(job: Job) -> State:
    """Keys and values travel; the state of this rank's queries is carried from hop to hop."""
    schedule = job.schedule()
    arrivals, sends = relay(job.ring, job.keys(), schedule.hops)
    queries, state = job.queries(), None
    for h, (hop, arrival) in enumerate(zip(schedule.hops, arrivals)):
        job.ring.at(WHAT, h)
        if hop.compute:
            job.wait(h, arrival.transfer)
            state = job.attend(h, queries, arrival.block, state)
        arrival.release()
    job.wait(len(arrivals), *sends)
    return job.empty_state(job.arrays[0].shape[2]) if state is None else state


def _gather(job: Job) -> State:
    """Keys and values travel to all ranks whose queries see them, and each computes once."""
    schedule = job.schedule()
    whole = collect(job.ring, job.keys(), schedule.hops)
    job.ring.at(WHAT, len(schedule.hops))
    return job.attend(len(schedule.hops), job.queries(), whole, None)


def _pass_q(job: Job) -> State:
    """Queries travel, and their states one hop behind; each rank adds what its own keys contribute."""
    schedule = job.schedule()
    own, keys, state = job.queries(), job.keys(), None
    arrivals, sends = relay(job.ring, own, schedule.hops)
    returning = _post_states(job, schedule)
    for h, (hop, arrival) in enumerate(zip(schedule.hops, arrivals)):
        job.ring.at(WHAT, h)
        added = None
        if hop.compute:
            job.wait(h, arrival.transfer)
            added = job.attend(h, rows(arrival.block, hop.compute), keys, None)
            added = _over(added, hop.compute, hop.state if h else own.spans)
        arrival.release()
        if h == 0:
            state = added
        elif hop.state:
            total = _merge_arrived(job, h, returning[h], added, hop.state)
            sends.append(job.ring.send(_block(total, hop.state).load(hop.state), tag=STATES + h))
    state = _merge_arrived(job, len(arrivals), returning[-1], state, own.spans)
    job.wait(len(arrivals), *sends)
    return state


def _post_states(job: Job, schedule: Schedule) -> list[Arrival]:
    """Post the receives of the states that come with each hop, and at the end of those that come home."""
    spans = [*(hop.returning for hop in schedule.hops), schedule.home]
    tags = [*range(STATES - 1, STATES - 1 + len(schedule.hops)), STATES + job.ring.size - 1]
    slots = Slots(_block(job.empty_state(1), ((0, 1),)), spans)
    return [slots.recv(job.ring, held, tag) for held, tag in zip(spans, tags)]


def _merge_arrived(job: Job, hop: int, arrival: Arrival, added: State | None, want: Spans) -> State:
    """The states that arrive, merged with what this rank `added` to them, over the rows at `want`."""
    state = job.empty_state(length(want)) if added is None else added
    if arrival.transfer is not None:
        job.wait(hop, arrival.transfer)
        state = merge_states(_over(State(*arrival.block.arrays), arrival.block.spans, want), state)
        mx.eval(*state)
    arrival.release()
    return state


def _block(state: State, spans: Spans) -> Block:
    return Block(tuple(map(mx.contiguous, state)), (2, 2, 2), spans)


def _over(state: State, have: Spans, want: Spans) -> State:
    """`state`, whose rows are at `have`, over the rows at `want`, which include those; the others see no key."""
    if have == want:
        return state
    batch, heads, tokens, dim = state.acc.shape
    at = np.full(length(want), tokens)
    at[positions(locate(have, want))] = np.arange(tokens)
    nothing = State.empty(batch, heads, 1, dim)
    return State(*(mx.take(mx.concatenate([x, none], 2), mx.array(at), 2) for x, none in zip(state, nothing)))


_STRATEGIES = {"pass_kv": _pass_kv, "pass_q": _pass_q, "gather": _gather}

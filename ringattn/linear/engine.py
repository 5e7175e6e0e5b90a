"""A linear recurrence over many tokens: chunks of tokens by matrix products, then their maps one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from ..core.affine import AffineMap, states_of_spans
from .chunks import Tokens, compute_chunks
from .recurrence import Recurrence, Span, single_step

CHUNK = 64  # tokens of a chunk at most; a power of two
SHORT = 16  # tokens of a chunk for keys with few dims: more would be nearly dependent, and their writes cancel
GROUP = 1 << 13  # tokens, counted for each head, whose chunks are computed together: bounds the memory


class _Carried(NamedTuple):
    """Results that one group of chunks gives the next, with the axes of the heads split: ``[B, Hk, Hv / Hk, ...]``."""

    state: mx.array
    transition: mx.array | None  # of all tokens so far; None where the state before them is known
    poison: mx.array  # NaN after a token that is not finite, else 0: [B, Hk, Hv / Hk, 1, 1]


def run(recurrence: Recurrence, state: mx.array | None) -> Span:
    """Compute all tokens from `state` ``[B, Hv, Dv, Dk]``, float32. ``None``: the state before them is not known yet.

    A token whose key, value, decay or beta is not finite makes the outputs of its head NaN from there on, and no
    earlier ones.
    """
    if recurrence.length == 1 and state is not None:
        return single_step(recurrence, state)
    batch, heads, _, dim = recurrence.v.shape
    carried = _start(recurrence, state)
    outs = [mx.zeros((batch, heads, 0, dim))]
    reads = [mx.zeros((batch, heads, 0, recurrence.k.shape[3]))]
    for start, stop, chunk in _groups(recurrence.length, _chunk(recurrence), GROUP // max(1, batch * heads)):
        part = recurrence.tokens(start, stop)
        part = part.after(outs[-1]) if start else part
        out, read, carried = _run_group(part, chunk, carried)
        outs.append(out)
        reads += [] if read is None else [read]
    offset = (carried.state + carried.poison).reshape(recurrence.state_shape)
    if carried.transition is None:
        return Span(mx.concatenate(outs, 2), AffineMap(None, offset))
    transition = carried.transition.reshape(recurrence.transition_shape)
    return Span(mx.concatenate(outs, 2), AffineMap(transition, offset), mx.concatenate(reads, 2))


def _start(recurrence: Recurrence, state: mx.array | None) -> _Carried:
    """Make the state before the first token, or zeros and the identity."""
    heads = recurrence.k.shape[1]
    clean = mx.zeros((1, 1, 1, 1, 1))
    if state is not None:
        return _Carried(_grouped(state, heads), None, clean)
    shape = recurrence.transition_shape
    identity = mx.ones(shape) if recurrence.beta is None else mx.broadcast_to(mx.eye(shape[-1]), shape)
    return _Carried(_grouped(mx.zeros(recurrence.state_shape), heads), _grouped(identity, heads), clean)


def _chunk(recurrence: Recurrence) -> int:
    """Tokens of a chunk: with the delta rule not many more than its keys have dims."""
    dim = recurrence.k.shape[3]
    return CHUNK if recurrence.beta is None or dim > SHORT else SHORT


def _groups(tokens: int, chunk: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Cut tokens into groups of whole chunks, ``(start, stop, chunk)``, of about `most` tokens. The last is shorter."""
    whole = tokens - tokens % chunk
    step = max(chunk, most - most % chunk)
    for start in range(0, whole, step):
        yield start, min(start + step, whole), chunk
    if whole < tokens:
        yield whole, tokens, 1 << (tokens - whole - 1).bit_length()


def _run_group(part: Recurrence, chunk: int, carried: _Carried) -> tuple[mx.array, mx.array | None, _Carried]:
    """Compute a group of chunks. Return its outputs, its reads if they are needed, and the start of the next group."""
    tokens, poison = _chunked(part, chunk)
    group = compute_chunks(tokens)
    matrix = part.beta is not None
    count = group.out.shape[3]
    transitions = [group.transition[:, :, :, i] for i in range(count)]
    offsets = [group.offset[:, :, :, i] for i in range(count)]
    *states, state = states_of_spans(carried.state, [AffineMap(*pair) for pair in zip(transitions, offsets)], matrix)
    out = _ungrouped(group.out + group.reads @ mx.stack(states, 3).swapaxes(-1, -2), part)
    poison = poison + carried.poison
    out = out + poison.reshape(*part.v.shape[:3], 1)
    carried = carried._replace(state=state, poison=poison[..., -1:, :])
    if carried.transition is None:
        return out, None, carried
    zero = mx.array(0.0)
    *before, after = states_of_spans(carried.transition, [AffineMap(x, zero) for x in transitions], matrix)
    prefix = mx.stack(before, 3)
    reads = group.reads @ prefix.swapaxes(-1, -2) if matrix else group.reads * prefix
    return out, _ungrouped(reads, part), carried._replace(transition=after)


def _chunked(part: Recurrence, chunk: int) -> tuple[Tokens, mx.array]:
    """Cut tokens into chunks ``[B, Hk, Hv / Hk or 1, chunks, C, ...]`` in float32, without NaN and infinity.

    The last chunk is filled up with tokens that change nothing. Return also NaN for every token at or after one that
    was not finite, else 0: ``[B, Hk, Hv / Hk, T, 1]``. In the products of a chunk a token has the weight 0 in the
    outputs before it, and 0 times NaN is NaN.
    """
    part = part.in_float32()
    heads = part.k.shape[1]
    missing = -part.length % chunk
    poison = mx.zeros((1, 1, 1, 1, 1))

    def chunks(x: mx.array, filling: float = 0.0) -> mx.array:
        if missing:
            x = mx.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)], constant_values=filling)
        return _grouped(mx.unflatten(x, 2, (-1, chunk)), heads)

    def clean(x: mx.array) -> mx.array:
        nonlocal poison
        own = (mx.stop_gradient(x) * 0).sum(-1, keepdims=True)
        poison = poison + _grouped(own, heads)
        return mx.where(own == 0, x, 0)

    tokens = Tokens(
        chunks(part.q * part.scale),
        chunks(clean(part.k)),
        chunks(clean(part.v)),
        chunks(clean(part.decay), 1.0),
        None if part.beta is None else chunks(clean(part.beta[..., None])),
    )
    return tokens, mx.cumsum(poison, 3)


def _grouped(x: mx.array, heads: int) -> mx.array:
    """Split axis 1 into the heads of keys and the heads of values that share one."""
    return mx.unflatten(x, 1, (heads, -1))


def _ungrouped(x: mx.array, part: Recurrence) -> mx.array:
    """Join heads and chunks again: ``[B, Hk, Hv / Hk, chunks, C, D]`` to ``[B, Hv, T, D]``."""
    return x.reshape(*part.v.shape[:2], -1, x.shape[-1])[:, :, : part.length]

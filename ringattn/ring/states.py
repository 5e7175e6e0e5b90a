"""States of a linear recurrence over the ring: one round in which all ranks learn the maps of all spans of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose, prod
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..autograd.custom_function import custom_op
from ..core.affine import AffineMap, states_of_spans
from ..errors import ArgumentError
from ..layout import Layout
from ..transport.consensus import Fields, agree, by_rank, raise_on_all_ranks
from ..transport.interface import Transport
from .blocks import raw

NEAR = 1e-3  # relative difference of the norms of states that count as equal: machines may round differently


class States(NamedTuple):
    """The states that a rank needs: before each of its spans, and after the whole sequence."""

    before: list[mx.array]
    after: mx.array


class Recurrence(NamedTuple):
    """The form of the maps of a layer, the same on every rank.

    Attributes:
        what: The name of the call, for messages.
        layout: The tokens of each rank.
        transition: The shape of a transition.
        matrix: Whether transitions are matrices; otherwise decays.
    """

    what: str
    layout: Layout
    transition: tuple[int, ...]
    matrix: bool

    @property
    def owners(self) -> list[int]:
        """The rank of each span, in the order of the tokens."""
        spans = [(span, rank) for rank, held in enumerate(self.layout.spans) for span in held]
        return [rank for _, rank in sorted(spans)]


def is_first(layout: Layout, rank: int, index: int) -> bool:
    """Whether the span `index` of `rank` is the first one of the sequence, so that the state before it is known."""
    return layout.spans[rank][index][0] == layout.start


def chain_states(
    ring: Transport,
    recurrence: Recurrence,
    state: mx.array,
    maps: Sequence[AffineMap],
    inputs: Sequence[mx.array] = (),
    fields: Fields = (),
) -> States:
    """Find the states before this rank's spans, and after all tokens. Collective; the caller holds the ring.

    The bytes sent do not depend on the number of tokens. Every rank composes the same maps in the same order, so all
    ranks of equal machines end with the same bits. Differentiable: the gradient is that of the sum of all ranks'
    losses, and collective too.

    Args:
        ring: The ring.
        recurrence: The form of the maps.
        state: The state before the whole sequence ``[..., value dim, key dim]``, float32, equal on all ranks.
        maps: The maps of this rank's spans. The first span of the sequence has no transition.
        inputs: Arrays of which a rank without tokens computed nothing; they keep it part of a gradient.
        fields: More values that all ranks must agree on.

    Raises:
        ArgumentError: On every rank, if the ranks differ in their arguments or in the state.
    """
    whole = _gathered(ring, recurrence, state, maps, inputs, fields)
    states = states_of_spans(state, whole, recurrence.matrix)
    own = [i for i, rank in enumerate(recurrence.owners) if rank == ring.rank]
    return States([states[i] for i in own], states[-1])


def _gathered(
    ring: Transport,
    recurrence: Recurrence,
    state: mx.array,
    maps: Sequence[AffineMap],
    inputs: Sequence[mx.array],
    fields: Fields,
) -> list[AffineMap]:
    """The maps of all spans, in the order of the tokens."""
    what = recurrence.what
    own = [x for step in maps for x in step if x is not None]
    parts = _parts(recurrence, state.shape)
    about = (
        ("layout", recurrence.layout.summary),
        ("state", f"{state.dtype} {state.shape}"),
        ("transition", str(recurrence.transition)),
        *fields,
    )

    def gather(state: mx.array, *arrays: mx.array) -> list[mx.array]:
        with raise_on_all_ranks(ring, what):
            sent = _packed(arrays[: len(own)])
            norm = np.float64(mx.sqrt(mx.sum(state * state)).item()).tobytes()
        replies = _exchange(ring, what, about, [memoryview(norm), *sent])
        _check_norms(what, [float(np.frombuffer(reply[:8], np.float64)[0]) for reply in replies])
        return _unpack([reply[8:] for reply in replies], parts)

    def gradient(*arrays: mx.array) -> list[mx.array]:
        given, cotangents = arrays[: 1 + len(own) + len(inputs)], arrays[1 + len(own) + len(inputs) :][: len(parts)]
        name = f"the gradient of {what}"
        with raise_on_all_ranks(ring, name):
            sent = _packed([x.astype(mx.float32) for x in cotangents])
        replies = _exchange(ring, name, about, sent)
        total = memoryview(sum(np.frombuffer(reply, np.float32) for reply in replies)).cast("B")
        sums = _unpack([total] * ring.size, [Part(0, shape) for _, shape in parts])
        mine = [x for x, part in zip(sums, parts) if part.rank == ring.rank]
        return [mx.zeros_like(given[0]), *mine, *(mx.zeros_like(x) for x in given[1 + len(own) :])]

    found = list(custom_op(what, gather, (state, *own, *inputs), gradient))
    rest = iter(found[1:])
    return [AffineMap(None, found[0]), *(AffineMap(transition, offset) for transition, offset in zip(rest, rest))]


class Part(NamedTuple):
    """One array of a map: the rank that sends it, and its shape."""

    rank: int
    shape: tuple[int, ...]


def _parts(recurrence: Recurrence, state: Sequence[int]) -> list[Part]:
    """The arrays of all spans, in the order of the tokens. The first span has no transition."""
    parts = []
    for i, rank in enumerate(recurrence.owners):
        parts += [Part(rank, recurrence.transition)] if i else []
        parts += [Part(rank, tuple(state))]
    return parts


def _packed(arrays: Sequence[mx.array]) -> list[memoryview]:
    packed = [mx.contiguous(x) for x in arrays]
    mx.eval(*packed)
    return [raw(x) for x in packed]


def _exchange(ring: Transport, what: str, fields: Fields, payload: Sequence[memoryview]) -> list[memoryview]:
    """Give every rank the bytes of all ranks, and count those that this rank sends."""
    replies = agree(ring, what, fields, payload=payload)
    ring.bytes_sent += (ring.size - 1) * sum(part.nbytes for part in payload)
    return replies


def _unpack(replies: Sequence[memoryview], parts: Sequence[Part]) -> list[mx.array]:
    """The arrays `parts` from the bytes of all ranks. Each rank's arrays follow each other in its bytes."""
    read = [0] * len(replies)
    arrays = []
    for rank, shape in parts:
        stop = read[rank] + 4 * prod(shape)
        arrays.append(mx.array(np.frombuffer(replies[rank][read[rank] : stop], np.float32).reshape(shape)))
        read[rank] = stop
    return arrays


def _check_norms(what: str, norms: Sequence[float]) -> None:
    """Raise unless the states before the sequence have the same norm on all ranks."""
    if not all(isclose(norm, norms[0], rel_tol=NEAR) or (norm != norm and norms[0] != norms[0]) for norm in norms):
        shown = by_rank([f"of norm {norm:.6g}" for norm in norms])
        raise ArgumentError(f"{what}: state differs between ranks: {shown}, expected the same state on every rank")

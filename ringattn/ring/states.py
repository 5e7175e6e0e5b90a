"""Linear recurrences over the ring: the states before each span of tokens, and the inputs just before it.

Both take one round, in which all ranks learn what each span leaves behind: the map of its state
(`ringattn.core.affine`), and its last inputs. The bytes do not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..core.affine import AffineMap, states_of_spans
from ..core.intervals import Span
from ..errors import ArgumentError
from ..layout import Layout
from ..transport.consensus import Fields, by_rank
from ..transport.interface import Transport
from .parts import Part, gather_parts

NEAR = 1e-3  # relative difference of the norms of states that count as equal: machines may round differently


class BeforeAndAfter(NamedTuple):
    """Arrays that a rank needs: before each of its spans, in order, and after the whole sequence."""

    before: list[mx.array]
    after: mx.array


class ChainCall(NamedTuple):
    """A collective call of a recurrent layer, the same on every rank.

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


def spans_in_order(layout: Layout) -> list[tuple[Span, int]]:
    """All spans in the order of the tokens, each with its rank."""
    return sorted((span, rank) for rank, held in enumerate(layout.spans) for span in held)


def is_first(layout: Layout, rank: int, index: int) -> bool:
    """Whether the span `index` of `rank` is the first one of the sequence, so that the state before it is known."""
    return layout.spans[rank][index][0] == layout.start


def chain_states(
    ring: Transport,
    call: ChainCall,
    state: mx.array,
    maps: Sequence[AffineMap],
    inputs: Sequence[mx.array] = (),
    fields: Fields = (),
) -> BeforeAndAfter:
    """Find the states before this rank's spans, and after all tokens. Collective; the caller holds the ring.

    Every rank composes the same maps in the same order, so all ranks of equal machines end with the same bits. The
    gradient is that of the sum of all ranks' losses, and collective too.

    Args:
        ring: The ring.
        call: The layout, and the form of the maps.
        state: The state before the whole sequence ``[..., value dim, key dim]``, float32, equal on all ranks.
        maps: The maps of this rank's spans, float32. The first span of the sequence has no transition.
        inputs: Arrays of which a rank computed none of its maps; they keep it part of a gradient.
        fields: More values that all ranks must agree on.

    Raises:
        ArgumentError: On every rank, if the ranks differ in their arguments or in the state.
    """
    what, layout, transition, matrix = call
    of_spans = [rank for _, rank in spans_in_order(layout)]
    parts = _norm_parts(ring, mx.float32)
    for i, rank in enumerate(of_spans):
        parts += [Part(rank, tuple(transition))] if i else []
        parts += [Part(rank, tuple(state.shape))]
    own = [_norm(state), *(x for step in maps for x in step if x is not None)]
    found = gather_parts(ring, what, parts, own, (("layout", layout.summary), *fields), inputs)
    _check_norms(what, "states", found[: ring.size])
    arrays = [None, *found[ring.size :]]
    maps = [AffineMap(transition, offset) for transition, offset in zip(arrays[::2], found[ring.size :: 2])]
    states = states_of_spans(state, maps, matrix)
    return BeforeAndAfter([states[i] for i, rank in enumerate(of_spans) if rank == ring.rank], states[-1])


def chain_inputs(
    ring: Transport,
    what: str,
    layout: Layout,
    state: mx.array,
    x: mx.array,
    fields: Fields = (),
) -> BeforeAndAfter:
    """Find the last inputs before each of this rank's spans, and before the end: the halo of a short convolution.

    Args:
        ring: The ring.
        what: The name of the call, for messages.
        layout: The tokens of each rank; a span may have fewer tokens than a halo.
        state: The inputs before the whole sequence ``[batch, halo, channels]``, equal on all ranks.
        x: This rank's inputs ``[batch, local tokens, channels]``, of the same dtype.
        fields: More values that all ranks must agree on.

    Returns:
        Arrays of the shape of `state`.

    Raises:
        ArgumentError: On every rank, if the ranks differ in their arguments or in the inputs before the sequence.
    """
    batch, halo, channels = state.shape
    spans = spans_in_order(layout)
    parts = _norm_parts(ring, x.dtype)
    parts += [Part(rank, (batch, min(halo, stop - start), channels)) for (start, stop), rank in spans]
    own = [_as_bits(_norm(state), x.dtype)]
    at = 0
    for start, stop in layout.spans[ring.rank]:
        at += stop - start
        own.append(x[:, at - min(halo, stop - start) : at])
    found = gather_parts(ring, what, parts, own, (("layout", layout.summary), *fields), [x])
    _check_norms(what, "inputs before the tokens", found[: ring.size])
    states = [state]
    for tail in found[ring.size :]:
        states.append(mx.concatenate([states[-1], tail], axis=1)[:, tail.shape[1] :])
    return BeforeAndAfter([states[i] for i, (_, rank) in enumerate(spans) if rank == ring.rank], states[-1])


def _norm(x: mx.array) -> mx.array:
    """The norm of an array ``[1]``, float32, without a gradient."""
    return mx.sqrt(mx.sum(mx.stop_gradient(x).astype(mx.float32) ** 2)).reshape(1)


def _as_bits(norm: mx.array, dtype: mx.Dtype) -> mx.array:
    """A norm as the bits of numbers of `dtype`; a wider one begins with it."""
    return mx.pad(norm, (0, max(4, dtype.size) // 4 - 1)).view(dtype)


def _norm_parts(ring: Transport, dtype: mx.Dtype) -> list[Part]:
    """The norm of each rank, as the bits of numbers of `dtype`."""
    return [Part(rank, (max(4, dtype.size) // dtype.size,)) for rank in range(ring.size)]


def _check_norms(what: str, name: str, found: Sequence[mx.array]) -> None:
    """Raise unless the arrays `name` before the sequence have the same norm on all ranks."""
    norms = np.array(mx.concatenate([mx.stop_gradient(x).view(mx.float32)[:1] for x in found])).tolist()
    if not all(isclose(norm, norms[0], rel_tol=NEAR) or (norm != norm and norms[0] != norms[0]) for norm in norms):
        shown = by_rank([f"of norm {norm:.6g}" for norm in norms])
        raise ArgumentError(f"{what}: {name} differ between ranks: {shown}, expected the same on every rank")

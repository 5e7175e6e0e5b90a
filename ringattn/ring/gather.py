"""Gather of an array: every rank gets the parts of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from ..autograd.custom_function import custom_op
from ..core.validation import check_array, check_int
from ..errors import ArgumentError
from ..transport.consensus import agree, raise_on_all_ranks
from .blocks import Block
from .call import check_layout, check_ring
from .relay import collect
from .schedule import Hop, Schedule

if TYPE_CHECKING:
    from ..layout import Layout
    from ..transport.base import Ring
    from ..transport.interface import Transport

WHAT = "gather"


def gather(layout: Layout, x: mx.array, ring: Ring, axis: int) -> mx.array:
    """Gather the parts `x` of all ranks. See `Layout.gather`."""
    ring = check_ring(ring)
    with ring.call(WHAT):
        with raise_on_all_ranks(ring, WHAT):
            axis = _checked(layout, x, ring, axis)
        return custom_op(WHAT, lambda x: (_gather(layout, x, ring, axis),), (x,))[0]


def _gather(layout: Layout, x: mx.array, ring: Transport, axis: int) -> mx.array:
    with raise_on_all_ranks(ring, WHAT):
        mx.eval(x)
    shape = [n for i, n in enumerate(x.shape) if i != axis]
    fields = (("layout", layout.summary), ("axis", str(axis)), ("dtype", str(x.dtype)), ("shape of x", str(shape)))
    agree(ring, WHAT, fields)
    with ring.break_ring_on_error():
        size = ring.size
        spans = layout.spans
        held = [(ring.rank - h) % size for h in range(size)]
        hops = [Hop(s, spans[s], spans[s], spans[s] if h + 1 < size else ()) for h, s in enumerate(held)]
        schedule = Schedule(tuple(hops), (), spans[ring.rank], 1)
        return collect(ring, Block((x,), (axis,), spans[ring.rank]), [schedule]).arrays[0]


def _checked(layout: Layout, x: mx.array, ring: Ring, axis: int) -> int:
    check_array("x", x)
    axis = check_int("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        raise ArgumentError(f"axis: {axis}, expected an axis of x, which has {x.ndim} dimensions")
    check_layout("layout", layout, ring, {"x": x.shape[axis]})
    return axis % x.ndim

"""broadcast and all_reduce, on top of what every transport can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError, ArgumentTypeError
from .agreement import agree
from .base import Ring, Transfer

SMALL_BYTES = 1 << 15  # up to here the data travel in the round that the agreement takes anyway
PIECE_BYTES = 4 << 20  # of a broadcast: a rank passes one on while it receives the next

# Sends slice i of the first list to rank i, and fills the second one with what rank i sends; lengths are agreed on.
Swap = Callable[[Sequence[memoryview], Sequence[memoryview]], None]


def array_error(x: Any) -> ArgumentError | None:
    """What is wrong with an `x` that should be an array."""
    return None if isinstance(x, mx.array) else ArgumentTypeError(f"x must be an mlx array, got {type(x).__name__}")


def root_error(root: Any, size: int) -> ArgumentError | None:
    """What is wrong with an index of a rank."""
    if isinstance(root, bool) or not isinstance(root, int):
        return ArgumentTypeError(f"root must be an int, got {type(root).__name__}")
    return None if 0 <= root < size else ArgumentError(f"root must be in 0..{size - 1}, got {root}")


def color_error(color: Any) -> ArgumentError | None:
    """What is wrong with a colour to split by."""
    if color is None or (isinstance(color, int) and not isinstance(color, bool)):
        return None
    return ArgumentTypeError(f"color must be an int or None, got {type(color).__name__}")


def to_bytes(x: mx.array) -> memoryview:
    """The bytes of `x` in row order, shared where its storage allows; the view keeps the memory alive."""
    if x.size == 0:
        return memoryview(b"")
    x = mx.contiguous(x)
    mx.eval(x)
    return _view(x)


def _view(x: Any) -> memoryview:
    return memoryview(x).cast("B")


def empty(shape: Sequence[int], dtype: mx.Dtype) -> tuple[mx.array, memoryview]:
    """An array to receive into, and its bytes."""
    x = mx.zeros(shape, dtype=dtype, stream=mx.cpu)
    mx.eval(x)
    return x, (_view(x) if x.size else memoryview(bytearray()))


def broadcast(ring: Ring, x: mx.array | None, root: int) -> mx.array:
    """See `Ring.broadcast`. Large arrays go round the ring in pieces, each passed on while the next arrives."""
    error = root_error(root, ring.size)
    payload: list[memoryview] = []
    if error is None and ring.rank == root:
        error = array_error(x)
        if isinstance(x, mx.array):
            data = to_bytes(x)
            about = json.dumps([_name(x.dtype), x.shape, len(data)]).encode()
            payload = [memoryview(about.ljust(256)), data if len(data) <= SMALL_BYTES else memoryview(b"")]
    told = agree(ring, "broadcast", (("root", str(root)),), error, payload)[root]
    name, shape, length = json.loads(bytes(told[:256]))
    if ring.rank == root:
        assert x is not None
        y, into = x, data
    else:
        y, into = empty(shape, getattr(mx, name))
    if length > SMALL_BYTES:
        with ring.committed():
            _pass_round(ring, into, root)
    elif ring.rank != root:
        into[:] = told[256:]
    return y


def _name(dtype: mx.Dtype) -> str:
    name = str(dtype).rpartition(".")[2]
    return "bool_" if name == "bool" else name


def _pass_round(ring: Ring, data: memoryview, root: int) -> None:
    transfers: list[Transfer] = []
    for tag, at in enumerate(range(0, len(data), PIECE_BYTES)):
        piece = [data[at : at + PIECE_BYTES]]
        arrival: list[Transfer] = []
        if ring.rank != root:
            arrival = [ring.recv(piece, tag=tag)]
        if (ring.rank + 1) % ring.size != root:
            transfers.append(ring.send(partial(list, piece), tag=tag, after=arrival))
        transfers += arrival
    ring.wait(*transfers)


def all_reduce(ring: Ring, x: mx.array, swap: Swap) -> mx.array:
    """See `Ring.all_reduce`. Summed in rank order: 16-bit floats in float32, with one cast at the end."""
    error = array_error(x)
    if error is not None:
        agree(ring, "all_reduce", error=error)
    fields = (("dtype", _name(x.dtype)), ("shape", str(x.shape)))
    data = to_bytes(x)
    small = len(data) <= SMALL_BYTES
    replies = agree(ring, "all_reduce", fields, None, [data] if small else [])
    if ring.size == 1:
        return x
    y, into = empty(x.shape, x.dtype)
    if small:
        into[:] = _sum(replies, x.dtype)
        return y
    with ring.committed():
        # Each rank sums one slice for all: 2 * (size - 1) / size of the bytes cross a rank's link, whatever the size.
        cuts = [x.size * i // ring.size * x.dtype.size for i in range(ring.size + 1)]
        theirs = [memoryview(bytearray(cuts[ring.rank + 1] - cuts[ring.rank])) for _ in range(ring.size)]
        theirs[ring.rank] = data[cuts[ring.rank] : cuts[ring.rank + 1]]
        swap([data[a:b] for a, b in pairwise(cuts)], theirs)
        own = into[cuts[ring.rank] : cuts[ring.rank + 1]]
        own[:] = _sum(theirs, x.dtype)
        swap([own] * ring.size, [into[a:b] for a, b in pairwise(cuts)])
    return y


def _sum(parts: Sequence[memoryview], dtype: mx.Dtype) -> memoryview:
    """The bytes of the sum of arrays of `dtype` given as bytes."""
    if len(parts[0]) == 0:
        return memoryview(b"")
    wide = mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype
    total = None
    for part in parts:
        x = mx.array(np.frombuffer(part, np.uint8)).view(dtype, stream=mx.cpu).astype(wide, stream=mx.cpu)
        total = x if total is None else mx.add(total, x, stream=mx.cpu)
        mx.eval(total)
    assert total is not None
    return to_bytes(total.astype(dtype, stream=mx.cpu))

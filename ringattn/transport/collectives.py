"""broadcast and all_reduce, built on the methods that every transport has."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..autograd.custom_function import custom_op
from ..core.validation import check_array, check_int
from ..errors import ArgumentError
from .base import Ring
from .consensus import agree, raise_on_all_ranks
from .interface import Transfer, Transport

SMALL_BYTES = 1 << 15  # up to here the data travel in the round that the agreement takes anyway
PIECE_BYTES = 4 << 20  # of a broadcast: a rank passes one on while it receives the next

# Send slice i of the first list to rank i, and fill slice i of the second one from rank i; lengths are agreed on.
Swap = Callable[[Sequence[memoryview], Sequence[memoryview]], None]
# Send the same bytes to every rank, and fill the list with the bytes of each rank; this rank's are in it already.
Share = Callable[[memoryview, Sequence[memoryview]], None]


def check_rank(name: str, rank: Any, size: int) -> int:
    """Return `rank` if it is the index of a rank."""
    rank = check_int(name, rank, 0)
    if rank >= size:
        raise ArgumentError(f"{name}: {rank}, expected less than {size}, the size of the ring")
    return rank


def check_color(color: Any) -> int | None:
    """Return `color` if it is a colour to split by: an int, or ``None``."""
    return None if color is None else check_int("color", color)


def to_bytes(x: mx.array) -> memoryview:
    """The bytes of `x` in row order, shared where its storage allows. The view keeps the memory alive."""
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


def broadcast(ring: Transport, x: mx.array | None, root: int) -> mx.array:
    """See `Ring.broadcast`. Large arrays travel around the ring in pieces, each passed on while the next arrives."""
    with raise_on_all_ranks(ring, "broadcast"):
        root = check_rank("root", root, ring.size)
        if ring.rank == root:
            check_array("x", x)
    if x is None or ring.rank != root:
        return _broadcast(ring, None, root)
    return custom_op("broadcast", lambda x: (_broadcast(ring, x, root),), (x,))[0]


def _broadcast(ring: Transport, x: mx.array | None, root: int) -> mx.array:
    payload: list[memoryview] = []
    if x is not None:
        with raise_on_all_ranks(ring, "broadcast"):
            data = to_bytes(x)
        about = json.dumps([_name(x.dtype), x.shape, len(data)]).encode()
        payload = [memoryview(about.ljust(256)), data if len(data) <= SMALL_BYTES else memoryview(b"")]
    reply = agree(ring, "broadcast", (("root", str(root)),), None, payload)[root]
    name, shape, length = json.loads(bytes(reply[:256]))
    y, into = empty(shape, getattr(mx, name)) if x is None else (x, data)
    if length > SMALL_BYTES:
        with ring.break_ring_on_error():
            _pass_along(ring, into, root)
    elif x is None:
        into[:] = reply[256:]
    return y


def broadcast_bytes(ring: Ring, data: bytes | None) -> bytes:
    """Return the bytes of rank 0 on every rank."""
    return bytes(to_bytes(ring.broadcast(None if data is None else mx.array(np.frombuffer(data, np.uint8)))))


def _name(dtype: mx.Dtype) -> str:
    name = str(dtype).rpartition(".")[2]
    return "bool_" if name == "bool" else name


def _pass_along(ring: Transport, data: memoryview, root: int) -> None:
    transfers: list[Transfer] = []
    for tag, start in enumerate(range(0, len(data), PIECE_BYTES)):
        piece = [data[start : start + PIECE_BYTES]]
        arrival: list[Transfer] = []
        if ring.rank != root:
            arrival = [ring.recv(piece, tag=tag)]
        if (ring.rank + 1) % ring.size != root:
            transfers.append(ring.send(partial(list, piece), tag=tag, after=arrival))
        transfers += arrival
    ring.wait(*transfers)


def all_reduce(ring: Transport, x: mx.array, swap: Swap, share: Share) -> mx.array:
    """See `Ring.all_reduce`. Summed in rank order: 16-bit floats in float32, with one cast at the end."""
    with raise_on_all_ranks(ring, "all_reduce"):
        check_array("x", x)
    return custom_op("all_reduce", lambda x: (_all_reduce(ring, x, swap, share),), (x,))[0]


def _all_reduce(ring: Transport, x: mx.array, swap: Swap, share: Share) -> mx.array:
    with raise_on_all_ranks(ring, "all_reduce"):
        data = to_bytes(x)
    fields = (("dtype", _name(x.dtype)), ("shape", str(x.shape)))
    small = len(data) <= SMALL_BYTES
    replies = agree(ring, "all_reduce", fields, None, [data] if small else [])
    if ring.size == 1:
        return x
    y, into = empty(x.shape, x.dtype)
    if small:
        into[:] = _sum(replies, x.dtype)
        return y
    with ring.break_ring_on_error():
        # Each rank sums one slice for all: 2 * (size - 1) / size of the bytes cross a rank's link, whatever the size.
        cuts = [x.size * i // ring.size * x.dtype.size for i in range(ring.size + 1)]
        theirs = [memoryview(bytearray(cuts[ring.rank + 1] - cuts[ring.rank])) for _ in range(ring.size)]
        theirs[ring.rank] = data[cuts[ring.rank] : cuts[ring.rank + 1]]
        swap([data[a:b] for a, b in pairwise(cuts)], theirs)
        own = into[cuts[ring.rank] : cuts[ring.rank + 1]]
        own[:] = _sum(theirs, x.dtype)
        share(own, [into[a:b] for a, b in pairwise(cuts)])
    return y


def swap_along(ring: Transport, out: Sequence[memoryview], into: Sequence[memoryview]) -> None:
    """Do a `Swap` between neighbours alone: at each step a rank passes on the slices for ranks further along."""
    rank, size = ring.rank, ring.size
    held = {(rank + far) % size: out[(rank + far) % size] for far in range(1, size)}
    for step in range(1, size):
        targets = [(rank + far) % size for far in range(size - step)]  # of what comes, this rank first
        coming = {target: memoryview(bytearray(len(out[target]))) for target in targets}
        coming[rank] = into[(rank - step) % size]
        sent = ring.send(partial(list, held.values()), tag=step)
        ring.wait(sent, ring.recv(list(coming.values()), tag=step))
        held = {target: coming[target] for target in targets[1:]}


def share_along(ring: Transport, own: memoryview, into: Sequence[memoryview]) -> None:
    """Do a `Share` between neighbours alone: each piece travels around the whole ring, passed on as it arrives."""
    transfers: list[Transfer] = []
    arrival: list[Transfer] = []
    for step in range(1, ring.size):
        piece = into[(ring.rank - step + 1) % ring.size] if step > 1 else own
        transfers.append(ring.send(partial(list, [piece]), tag=step, after=arrival))
        arrival = [ring.recv([into[(ring.rank - step) % ring.size]], tag=step)]
        transfers += arrival
    ring.wait(*transfers)


def _sum(parts: Sequence[memoryview], dtype: mx.Dtype) -> memoryview:
    """Sum arrays of `dtype`, given and returned as bytes."""
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

"""One round in which every rank learns small arrays of all ranks, such as states and halos. Differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..autograd.custom_function import custom_op
from ..transport.consensus import Fields, agree, raise_on_all_ranks
from ..transport.interface import Transport
from .blocks import raw


class Part(NamedTuple):
    """One of the arrays: the rank that has it, and its shape."""

    rank: int
    shape: tuple[int, ...]


def gather_parts(
    ring: Transport,
    what: str,
    parts: Sequence[Part],
    own: Sequence[mx.array],
    fields: Fields = (),
    inputs: Sequence[mx.array] = (),
) -> list[mx.array]:
    """Return the arrays `parts` of all ranks, in their order. Collective; the caller holds the ring.

    The gradient is that of the sum of all ranks' losses, and collective too.

    Args:
        ring: The ring.
        what: The name of the call, for messages.
        parts: The arrays of all ranks, the same list on every rank. All have one dtype.
        own: This rank's arrays, in the order of its `parts`.
        fields: Values that all ranks must agree on.
        inputs: Arrays of which a rank without parts computed nothing; they keep it part of a gradient. At least one
            array in `own` and `inputs` together.
    """
    dtype = (*own, *inputs)[0].dtype
    about = (*fields, ("arrays", str([tuple(part) for part in parts])), ("dtype", str(dtype)))
    if not parts:  # MLX has no custom function without results
        _exchange(ring, what, about, ())
        return []

    def gather(*arrays: mx.array) -> list[mx.array]:
        return _unpack(_exchange(ring, what, about, arrays[: len(own)]), parts, dtype)

    def gradient(*arrays: mx.array) -> list[mx.array]:
        given = arrays[: len(own) + len(inputs)]
        cotangents = [x.astype(mx.float32) for x in arrays[len(given) : len(given) + len(parts)]]
        replies = _exchange(ring, f"the gradient of {what}", about, cotangents)
        total = np.sum([np.frombuffer(reply, np.float32) for reply in replies], axis=0, dtype=np.float32)
        sums = _unpack([raw(total)], [Part(0, shape) for _, shape in parts], mx.float32)
        mine = [x.astype(dtype) for x, part in zip(sums, parts) if part.rank == ring.rank]
        return [*mine, *(mx.zeros_like(x) for x in given[len(own) :])]

    return list(custom_op(what, gather, (*own, *inputs), gradient))


def _exchange(ring: Transport, what: str, fields: Fields, arrays: Sequence[mx.array]) -> list[memoryview]:
    """Give every rank the bytes of the arrays of all ranks, and count those that this rank sends."""
    with raise_on_all_ranks(ring, what):
        packed = [mx.contiguous(x) for x in arrays]
        mx.eval(*packed)
        payload = [raw(x) for x in packed]
    replies = agree(ring, what, fields, payload=payload)
    ring.bytes_sent += (ring.size - 1) * sum(part.nbytes for part in payload)
    return replies


def _unpack(replies: Sequence[memoryview], parts: Sequence[Part], dtype: mx.Dtype) -> list[mx.array]:
    """Make the arrays `parts` of the bytes of all ranks. The arrays of one rank follow each other in its bytes."""
    read = [0] * len(replies)
    arrays = []
    for rank, shape in parts:
        stop = read[rank] + prod(shape) * dtype.size
        data = mx.array(np.frombuffer(replies[rank][read[rank] : stop], np.uint8))
        arrays.append(data.view(dtype).reshape(shape) if data.size else mx.zeros(shape, dtype))
        read[rank] = stop
    return arrays

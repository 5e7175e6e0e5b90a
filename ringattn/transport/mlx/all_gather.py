"""What ranks say in a gather: frames of one length, each of which begins with the round that it belongs to."""

from __future__ import annotations

import struct
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RingError
from .backend import Group

FRAME_BYTES = 34 << 10  # of every rank in a gather: enough for the states of 64 heads of 128 dims

_HEAD = struct.Struct("<4sIQQ")  # magic, channel, epoch, bytes of the payload
_ROUND_BYTES = 16  # of a head: all but the last number
_MAGIC = b"rf01"
INLINE_BYTES = FRAME_BYTES - _HEAD.size


def gather(group: Group, channel: int, epoch: int, payload: bytes, stream: Any) -> list[memoryview]:
    """Every rank's payload: by one gather, and a second one if any is longer than a frame holds.

    Args:
        group: What moves the bytes.
        channel: Of the ring whose round it is.
        epoch: The number of the gather.
        payload: This rank's bytes.
        stream: On which MLX does it.

    Raises:
        RingError: A rank is in another round.
    """
    frame = np.zeros(FRAME_BYTES, np.uint8)
    text = _HEAD.pack(_MAGIC, channel, epoch, len(payload)) + payload[:INLINE_BYTES]
    frame[: len(text)] = np.frombuffer(text, np.uint8)
    frames = group.gather(frame, stream)
    lengths = [_read_head(rank, memoryview(row), channel, epoch) for rank, row in enumerate(frames)]
    longest = max(lengths)
    if longest > INLINE_BYTES:
        rest = np.zeros(longest - INLINE_BYTES, np.uint8)
        own = np.frombuffer(payload, np.uint8)[INLINE_BYTES:]
        rest[: len(own)] = own
        frames = np.concatenate([frames, group.gather(rest, stream)], axis=1)
    return [memoryview(row)[_HEAD.size : _HEAD.size + n] for row, n in zip(frames, lengths)]


def _read_head(rank: int, frame: memoryview, channel: int, epoch: int) -> int:
    magic, theirs, round_, count = _HEAD.unpack_from(frame)
    if (magic, theirs, round_) != (_MAGIC, channel, epoch):
        raise RingError(f"rank {rank} is in another round: rings must be used in the same order on all ranks")
    return int(count)


def gather_in_graph(
    group: Group, channel: int, epoch: int, payload: mx.array, after: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The same gather on the link as a node of MLX's graph, of a payload of at most `INLINE_BYTES`.

    Args:
        group, channel, epoch: As in `gather`.
        payload: This rank's bytes, uint8.
        after: What has to be evaluated before.

    Returns:
        The gather, for another one to come after; and the bytes of all ranks, as rows as long as this rank's payload:
        zeros for what a rank did not send, and in all of the row of a rank that was in another round.
    """
    count = payload.size
    head = mx.array(np.frombuffer(_HEAD.pack(_MAGIC, channel, epoch, count), np.uint8))
    frame = mx.concatenate([head, payload, mx.zeros(INLINE_BYTES - count, mx.uint8)])
    if after is not None:
        frame = mx.depends([frame], [after])[0]
    frames = group.gather_in_graph(frame)
    same_round = mx.all(frames[:, :_ROUND_BYTES] == head[:_ROUND_BYTES], axis=1, keepdims=True)
    return frames, mx.where(same_round, frames[:, _HEAD.size : _HEAD.size + count], 0)

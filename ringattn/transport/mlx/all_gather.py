"""The gather of every rank's payload: frames of one length, each with a head that names its gather."""

from __future__ import annotations

import struct
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RingError
from .backend import Group

FRAME_BYTES = 34 << 10  # of every rank in a gather: enough for the states of 64 heads of 128 dims

_HEAD = struct.Struct("<4sIQQ")  # magic, channel, epoch, bytes of the payload
_ID_BYTES = 16  # of a head: magic, channel and epoch, which are the same on all ranks in one gather
_MAGIC = b"rf01"
INLINE_BYTES = FRAME_BYTES - _HEAD.size


def gather(group: Group, channel: int, epoch: int, payload: bytes, stream: Any) -> list[memoryview]:
    """Gather every rank's payload. A second gather follows if a payload is longer than `INLINE_BYTES`.

    Args:
        group: The group that moves the bytes.
        channel: The channel of the ring that gathers.
        epoch: The number of the gather.
        payload: This rank's bytes.
        stream: The MLX stream to run on.

    Raises:
        RingError: If a rank is in another gather.
    """
    frame = np.zeros(FRAME_BYTES, np.uint8)
    text = _HEAD.pack(_MAGIC, channel, epoch, len(payload)) + payload[:INLINE_BYTES]
    frame[: len(text)] = np.frombuffer(text, np.uint8)
    frames = group.gather(frame, stream)
    lengths = [_payload_bytes(rank, memoryview(row), channel, epoch) for rank, row in enumerate(frames)]
    longest = max(lengths)
    if longest > INLINE_BYTES:
        rest = np.zeros(longest - INLINE_BYTES, np.uint8)
        own = np.frombuffer(payload, np.uint8)[INLINE_BYTES:]
        rest[: len(own)] = own
        frames = np.concatenate([frames, group.gather(rest, stream)], axis=1)
    return [memoryview(row)[_HEAD.size : _HEAD.size + n] for row, n in zip(frames, lengths)]


def _payload_bytes(rank: int, frame: memoryview, channel: int, epoch: int) -> int:
    """Read the length of a rank's payload from the head of its frame."""
    magic, its_channel, its_epoch, count = _HEAD.unpack_from(frame)
    if (magic, its_channel, its_epoch) != (_MAGIC, channel, epoch):
        raise RingError(f"rank {rank} is in another round: rings must be used in the same order on all ranks")
    return int(count)


def gather_in_graph(
    group: Group, channel: int, epoch: int, payload: mx.array, after: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Gather a payload of at most `INLINE_BYTES` as a node of MLX's graph. `gather` can be its counterpart on a rank.

    Args:
        group: The group that moves the bytes.
        channel: The channel of the ring that gathers.
        epoch: The number of the gather.
        payload: This rank's bytes, uint8.
        after: An array to evaluate before the gather.

    Returns:
        The frames, as an array that the next gather can come after; and the payloads of all ranks, as rows as long as
        this rank's payload. Bytes that a rank did not send are zero, and so is the whole row of a rank that was in
        another gather.
    """
    count = payload.size
    head = mx.array(np.frombuffer(_HEAD.pack(_MAGIC, channel, epoch, count), np.uint8))
    frame = mx.concatenate([head, payload, mx.zeros(INLINE_BYTES - count, mx.uint8)])
    if after is not None:
        frame = mx.depends([frame], [after])[0]
    frames = group.gather_in_graph(frame)
    same_gather = mx.all(frames[:, :_ID_BYTES] == head[:_ID_BYTES], axis=1, keepdims=True)
    return frames, mx.where(same_gather, frames[:, _HEAD.size : _HEAD.size + count], 0)

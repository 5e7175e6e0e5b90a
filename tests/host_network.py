"""GPUs whose memory is that of the host, and a network of them: what NCCL does, over the messages of an MPI ring."""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Sequence

import mlx.core as mx

from ringattn.native.cuda import Kind
from ringattn.transport.gpu.links import DeviceLinks
from ringattn.transport.gpu.nccl import Piece
from ringattn.transport.mpi.progress import Message
from ringattn.transport.mpi.ring import MpiRing

FIRST_TAG = 100_000  # above those of the ring's own messages


class HostNetwork:
    """Groups of messages as NCCL does them: without tags, one group after the other.

    Attributes:
        gpu: The GPU of this rank.
        groups: The number of groups that have started.
    """

    def __init__(self, ring: MpiRing):
        self.gpu = HostGpu()
        self._ring = ring
        self._count: Counter[tuple[str, int]] = Counter()
        self._last: list[Message] = []
        self.groups = 0
        self.aborted = False

    def start(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> list[Message]:
        self.groups += 1
        pieces = [("send", piece) for piece in sends] + [("recv", piece) for piece in receives]
        self._last = [self._message(kind, piece) for kind, piece in pieces]
        for message in self._last:
            self._ring._add(message)
        return self._last

    def _message(self, kind: str, piece: Piece) -> Message:
        tag = FIRST_TAG + self._count[kind, piece.peer]
        self._count[kind, piece.peer] += 1
        memory = memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")
        return Message(kind, piece.peer, tag, lambda: [memory], self._last)

    def over(self, token: list[Message]) -> bool:
        return all(message.done for message in token)

    def check(self) -> None:
        assert not self.aborted

    def abort(self) -> None:
        self.aborted = True


class HostGpu:
    """A GPU's driver for arrays of the host.

    Attributes:
        delay: Seconds that copies take, so that what reads them too early is seen.
        copied: Bytes copied so far.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.copied = 0

    def locate(self, arrays: Sequence[mx.array]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        return [], lambda: [_address(x) for x in arrays]

    def allocate(self, kinds: Sequence[Kind]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        """Arrays of ones, so that what reads them too early is seen."""
        arrays = [mx.ones(tuple(shape), dtype) for shape, dtype in kinds]
        return arrays, lambda: [_address(x) for x in arrays]

    def pack(self, arrays: Sequence[mx.array], axes: Sequence[int], room: int) -> list[mx.array]:
        packed = []
        for x, axis in zip(arrays, axes):
            first = mx.moveaxis(x, axis, 0)
            more = room + 1 - len(first)  # at least 1: without padding, MLX might return the memory of `x`
            packed.append(mx.concatenate([first, mx.ones((more, *first.shape[1:]), x.dtype)])[:room])
        return packed

    def pinned(self, count: int) -> memoryview:
        return memoryview(bytearray(b"\xff" * (count + 64)))

    def copy_all(self, targets: Sequence[int], sources: Sequence[int], counts: Sequence[int]) -> None:
        time.sleep(self.delay)
        for target, source, count in zip(targets, sources, counts):
            ctypes.memmove(target, source, count)
            self.copied += count


def _address(x: mx.array) -> int:
    mx.eval(x)
    assert memoryview(x).c_contiguous
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(x).cast("B"))) if x.size else 0


def use_host_network(ring: MpiRing) -> HostNetwork:
    """Let the blocks of `ring` travel as if its ranks had GPUs."""
    network = HostNetwork(ring)
    ring.has_gpus = True
    ring._links = DeviceLinks(ring.rank, ring.size, network, ring._moved)
    return network

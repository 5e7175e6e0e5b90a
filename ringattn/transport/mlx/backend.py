"""The group of all processes in `mx.distributed`: its backend, and transfers of bytes.

Two backends can carry a ring. `ring` is TCP between neighbours: a rank may send to the right while it receives from
the left. `jaccl` is RDMA over Thunderbolt: there a send and a receive with one peer poll the same completions. So a
rank does one thing at a time, and two ranks that send to each other use `all_gather`.

Every transfer here returns when the bytes have left or have arrived. If a rank dies it may never return; it holds no
global interpreter lock meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RingError
from ..addresses import own_address_towards
from ..interface import Buffers

PIECE_BYTES = 4 << 20  # of a message: while one piece moves, another is copied

Piece = tuple[list[np.ndarray], int]  # parts of buffers, and the number of their bytes


class Group:
    """The processes that `mx.distributed` connects. The constructor starts `mx.distributed`.

    Attributes:
        duplex: Whether a rank may send and receive at the same time.
        addresses: Addresses at which the others may reach this machine, the best first.
    """

    def __init__(self) -> None:
        backend = chosen_backend()
        if not mx.distributed.is_available(backend):
            needs = " (it needs macOS 26.2 and Thunderbolt 5)" if backend == "jaccl" else ""
            raise RingError(f"this build of MLX has no backend {backend!r}{needs}: launch with --backend ring")
        try:
            self._group = mx.distributed.init(strict=True, backend=backend)
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise RingError(f"mx.distributed could not start its backend {backend!r}: {why}") from error
        self.rank = self._group.rank()
        self.size = self._group.size()
        # With the variable, backend `ring` does one thing at a time too, so that this can be tested without jaccl.
        self.duplex = backend == "ring" and os.environ.get("RINGATTN_MLX_ONE_WAY") != "1"
        self.addresses = _addresses(backend, self.rank)

    def send(self, buffers: Buffers, peer: int, stream: Any) -> None:
        """Send `buffers` as one message."""
        staging: list[tuple[mx.array, np.ndarray]] = []
        in_flight: list[mx.array] = []
        for i, (parts, count) in enumerate(split_pieces(buffers, PIECE_BYTES)):
            if i < 2:
                staging.append(_scratch(count, stream))
            else:
                mx.eval(in_flight.pop(0))  # the piece that used this memory has left
            x, view = staging[i % 2]
            copy_bytes(parts, [view])
            x = x if count == x.size else mx.array(view[:count])  # only the last is shorter
            sent = mx.distributed.send(x, peer, group=self._group, stream=stream)
            mx.async_eval(sent)
            in_flight.append(sent)
        mx.eval(in_flight)

    def recv(self, buffers: Buffers, peer: int, stream: Any) -> None:
        """Receive one message into `buffers`, which have exactly its size."""
        expected: list[tuple[mx.array, list[np.ndarray]]] = []
        for parts, count in split_pieces(buffers, PIECE_BYTES):
            x = mx.distributed.recv((count,), mx.uint8, peer, group=self._group, stream=stream)
            mx.async_eval(x)
            expected.append((x, parts))
            if len(expected) == 2:
                _copy_arrived(*expected.pop(0))
        for x, parts in expected:
            _copy_arrived(x, parts)

    def swap(self, out: Buffers, into: Buffers, stream: Any) -> None:
        """Send `out` and receive `into` in a group of two, by all_gather. One of them may be empty."""
        sent = split_pieces(out, PIECE_BYTES)
        received = split_pieces(into, PIECE_BYTES)
        nothing: Piece = ([], 0)
        for (source, source_bytes), (target, target_bytes) in zip_longest(sent, received, fillvalue=nothing):
            own = np.zeros(max(source_bytes, target_bytes), np.uint8)
            copy_bytes(source, [own[:source_bytes]])
            other = self.gather(own, stream)[1 - self.rank]
            copy_bytes([other[:target_bytes]], target)

    def gather(self, x: np.ndarray, stream: Any) -> np.ndarray:
        """Gather every rank's `x`, bytes of the same number on all ranks, as rows."""
        gathered = self.gather_in_graph(mx.array(x), stream)
        mx.eval(gathered)
        return np.asarray(memoryview(gathered))  # type: ignore[arg-type]

    def gather_in_graph(self, x: mx.array, stream: Any = None) -> mx.array:
        """Gather every rank's `x` as a node of MLX's graph."""
        return mx.distributed.all_gather(mx.expand_dims(x, 0, stream=stream), group=self._group, stream=stream)


def split_pieces(buffers: Buffers, piece_bytes: int) -> Iterator[Piece]:
    """Split the bytes of `buffers` into pieces of `piece_bytes`, of which the last may be shorter."""
    parts: list[np.ndarray] = []
    count = 0
    for buffer in buffers:
        rest = np.frombuffer(buffer, np.uint8) if len(buffer) else np.empty(0, np.uint8)
        while len(rest):
            part, rest = rest[: piece_bytes - count], rest[piece_bytes - count :]
            parts.append(part)
            count += len(part)
            if count == piece_bytes:
                yield parts, count
                parts, count = [], 0
    if count:
        yield parts, count


def copy_bytes(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
    """Copy the concatenated bytes of `sources` to those of `targets`, until one of the two ends."""
    sources = list(sources)
    targets = list(targets)
    while sources and targets:
        count = min(len(sources[0]), len(targets[0]))
        np.copyto(targets[0][:count], sources[0][:count])
        sources[0] = sources[0][count:]
        targets[0] = targets[0][count:]
        for arrays in (sources, targets):
            if not len(arrays[0]):
                arrays.pop(0)


def _scratch(count: int, stream: Any) -> tuple[mx.array, np.ndarray]:
    x = mx.zeros(count, dtype=mx.uint8, stream=stream)
    mx.eval(x)
    return x, np.asarray(memoryview(x))  # type: ignore[arg-type]


def _copy_arrived(x: mx.array, parts: Sequence[np.ndarray]) -> None:
    mx.eval(x)
    copy_bytes([np.asarray(memoryview(x))], parts)  # type: ignore[arg-type]


def chosen_backend() -> str:
    """Return the backend that the launcher has prepared: ``"ring"`` or ``"jaccl"``."""
    if "MLX_HOSTFILE" in os.environ:
        return "ring"
    if "MLX_IBV_DEVICES" in os.environ or "MLX_JACCL_COORDINATOR" in os.environ:
        return "jaccl"
    if "NCCL_HOST_IP" in os.environ:
        raise RingError("backend 'mlx': NCCL has no send and receive; launch with mlx.launch --backend ring")
    raise RingError("backend 'mlx': no launcher has set MLX_HOSTFILE or MLX_IBV_DEVICES; start with mlx.launch")


def launched_size() -> int:
    """Return the number of processes that the launcher has started.

    `mx.distributed` is not asked: jaccl refuses a group of one only after half a minute.
    """
    name = "MLX_HOSTFILE" if chosen_backend() == "ring" else "MLX_IBV_DEVICES"
    hosts = _read_list(name)
    return max(1, len(hosts))


def _read_list(name: str) -> list[Any]:
    path = os.environ.get(name, "")
    try:
        text = Path(path).read_text()
        hosts = json.loads(text) if text.strip() else []
    except (OSError, ValueError) as error:
        raise RingError(f"{name}: {path!r} cannot be read as JSON ({error})") from error
    if not isinstance(hosts, list):
        raise RingError(f"{name}: {path!r} holds a {type(hosts).__name__}, expected a list with one entry a rank")
    return hosts


def _addresses(backend: str, rank: int) -> list[str]:
    found: list[str | None] = []
    if backend == "ring":
        hosts = [[str(address).rpartition(":")[0] for address in entry] for entry in _read_list("MLX_HOSTFILE")]
        found += hosts[rank]
        found += [own_address_towards(address) for entry in hosts for address in entry]
    else:
        coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]
        found += [coordinator] if rank == 0 else []
        found.append(own_address_towards(coordinator))
    if not all(address is None or address.startswith("127.") for address in found):
        found.append(own_address_towards("192.0.2.1"))  # TEST-NET-1, which no host has: the default route
    return list(dict.fromkeys(address for address in found if address))

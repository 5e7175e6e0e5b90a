"""The group of all processes in `mx.distributed`: which backend it is, and the bytes that it moves.

Two backends can carry a ring. `ring` is TCP between neighbours: a rank may send to the right while it receives from
the left. `jaccl` is RDMA over Thunderbolt: there send and receive with one peer look at the same completions, so a rank
does one thing at a time, and two ranks that have something for each other use `all_gather`.

Everything here returns when the bytes have left or are here. It may run for ever if a rank dies, with the interpreter's
lock released.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RingError
from ..addresses import own_address_towards

PIECE_BYTES = 4 << 20  # of a message: while one piece is on its way, another is copied

Pieces = Sequence[memoryview]


class Group:
    """The processes that `mx.distributed` connects, started when this is made.

    Attributes:
        duplex: Whether a rank may send and receive at the same time.
        addresses: Where this machine may be reached by the others, the best first.
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
        self.rank, self.size = self._group.rank(), self._group.size()
        # The other way can be tried where there is no jaccl.
        self.duplex = backend == "ring" and os.environ.get("RINGATTN_MLX_ONE_WAY") != "1"
        self.addresses = _addresses(backend, self.rank)

    def send(self, buffers: Pieces, peer: int, stream: Any) -> None:
        """Send `buffers` as one message."""
        staging: list[tuple[mx.array, np.ndarray]] = []
        under_way: list[mx.array] = []
        for i, (parts, count) in enumerate(cut(buffers, PIECE_BYTES)):
            if i < 2:
                staging.append(_scratch(count, stream))
            else:
                mx.eval(under_way.pop(0))  # the piece that used this memory has left
            x, view = staging[i % 2]
            pour(parts, [view])
            x = x if count == x.size else mx.array(view[:count])  # only the last is shorter
            sent = mx.distributed.send(x, peer, group=self._group, stream=stream)
            mx.async_eval(sent)
            under_way.append(sent)
        mx.eval(under_way)

    def recv(self, buffers: Pieces, peer: int, stream: Any) -> None:
        """Receive one message into `buffers`, of exactly the size that is sent."""
        expected: list[tuple[mx.array, list[np.ndarray]]] = []
        for parts, count in cut(buffers, PIECE_BYTES):
            x = mx.distributed.recv((count,), mx.uint8, peer, group=self._group, stream=stream)
            mx.async_eval(x)
            expected.append((x, parts))
            if len(expected) == 2:
                _arrive(*expected.pop(0))
        for x, parts in expected:
            _arrive(x, parts)

    def swap(self, out: Pieces, into: Pieces, stream: Any) -> None:
        """In a group of two: send `out` and receive `into`, of which one may be empty, by all_gather."""
        leaving, coming = list(cut(out, PIECE_BYTES)), list(cut(into, PIECE_BYTES))
        for i in range(max(len(leaving), len(coming))):
            here, here_bytes = leaving[i] if i < len(leaving) else ([], 0)
            there, there_bytes = coming[i] if i < len(coming) else ([], 0)
            both = np.zeros(max(here_bytes, there_bytes), np.uint8)
            pour(here, [both[:here_bytes]])
            other = self.gather(both, stream)[1 - self.rank]
            pour([other[:there_bytes]], there)

    def gather(self, x: np.ndarray, stream: Any) -> np.ndarray:
        """Every rank's `x`, bytes of the same number everywhere, as rows."""
        gathered = self.gather_in_graph(mx.array(x), stream)
        mx.eval(gathered)
        return np.asarray(memoryview(gathered))  # type: ignore[arg-type]

    def gather_in_graph(self, x: mx.array, stream: Any = None) -> mx.array:
        """The same as a node of MLX's graph."""
        return mx.distributed.all_gather(mx.expand_dims(x, 0, stream=stream), group=self._group, stream=stream)


def cut(buffers: Pieces, most: int) -> Iterator[tuple[list[np.ndarray], int]]:
    """The bytes of `buffers` in pieces of `most` bytes, the last shorter: each as parts, and how many bytes it has."""
    parts: list[np.ndarray] = []
    count = 0
    for buffer in buffers:
        rest = np.frombuffer(buffer, np.uint8) if len(buffer) else np.empty(0, np.uint8)
        while len(rest):
            part, rest = rest[: most - count], rest[most - count :]
            parts.append(part)
            count += len(part)
            if count == most:
                yield parts, count
                parts, count = [], 0
    if count:
        yield parts, count


def pour(out: Sequence[np.ndarray], into: Sequence[np.ndarray]) -> None:
    """Copy the bytes of `out`, end to end, to those of `into`: as many as the shorter has."""
    sources, targets = list(out), list(into)
    while sources and targets:
        count = min(len(sources[0]), len(targets[0]))
        np.copyto(targets[0][:count], sources[0][:count])
        sources[0], targets[0] = sources[0][count:], targets[0][count:]
        for arrays in (sources, targets):
            if not len(arrays[0]):
                arrays.pop(0)


def _scratch(count: int, stream: Any) -> tuple[mx.array, np.ndarray]:
    x = mx.zeros(count, dtype=mx.uint8, stream=stream)
    mx.eval(x)
    return x, np.asarray(memoryview(x))  # type: ignore[arg-type]


def _arrive(x: mx.array, parts: Sequence[np.ndarray]) -> None:
    mx.eval(x)
    pour([np.asarray(memoryview(x))], parts)  # type: ignore[arg-type]


def chosen_backend() -> str:
    """``"ring"`` or ``"jaccl"``, whichever the launcher has prepared."""
    if "MLX_HOSTFILE" in os.environ:
        return "ring"
    if "MLX_IBV_DEVICES" in os.environ or "MLX_JACCL_COORDINATOR" in os.environ:
        return "jaccl"
    if "NCCL_HOST_IP" in os.environ:
        raise RingError("backend 'mlx': NCCL has no send and receive; launch with mlx.launch --backend ring")
    raise RingError("backend 'mlx': no launcher has set MLX_HOSTFILE or MLX_IBV_DEVICES; start with mlx.launch")


def launched_size() -> int:
    """How many processes the launcher has started; a group of one takes jaccl half a minute to refuse."""
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
        found.append(own_address_towards("192.0.2.1"))  # nobody has it: the way to the rest of the world
    return list(dict.fromkeys(address for address in found if address))

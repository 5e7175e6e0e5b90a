"""The group of `mx.distributed` that joins the ranks of one row of a grid, beside a ring over MPI.

`mx.distributed` has one world in each process, and MLX reads its members from the environment when it starts. The ranks
exchange their addresses over the ring. Then each row starts a world of its own. The messages of `mx.distributed` have
no authentication: a row listens only at the address that the launcher gives, and at 127.0.0.1 on one host.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import mlx.core as mx

from ...errors import ArgumentError, RingError
from ..addresses import RDMA, address_for_peers
from ..consensus import agree, raise_on_all_ranks
from ..interface import Transport

CALL = "grid"
BACKENDS = ("ring", "jaccl", "nccl")

Address = tuple[str, int]

_row: mx.distributed.Group | None = None  # of this process


def open_row(ring: Transport, tensor: int, backend: str | None = None) -> mx.distributed.Group:
    """Join the ranks of this rank's row, `tensor` neighbours of `ring`. Collective. A second call returns the same row.

    Raises:
        ArgumentError: The backend is unknown or not available on a rank.
        RingError: A row could not be connected.
    """
    global _row
    with raise_on_all_ranks(ring, CALL):
        backend = _checked_backend(backend)
        if _row is not None:
            if (_row.size(), _row.rank()) != (tensor, ring.rank % tensor):
                raise ArgumentError(f"tensor: {tensor}, expected {_row.size()}: a process can join one row in its life")
            return _row
        address = address_for_peers(ring.hosts)
        reserved = _reserve_port(address)
    with closing(reserved):
        endpoint = json.dumps([address, reserved.getsockname()[1]]).encode()
        fields = (("tensor", str(tensor)), ("backend", backend))
        replies = agree(ring, CALL, fields, payload=[memoryview(endpoint)])
        first = ring.rank // tensor * tensor
        members = [tuple(json.loads(bytes(reply))) for reply in replies[first : first + tensor]]
        with ring.break_ring_on_error():
            _row = _connect(backend, ring.rank % tensor, members, first)
    return _row


def _checked_backend(backend: str | None) -> str:
    chosen = ("jaccl" if os.environ.get(RDMA) else "ring") if backend is None else backend
    if chosen not in BACKENDS:
        raise ArgumentError(f"backend: {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}, or None")
    if not mx.distributed.is_available(chosen):
        raise ArgumentError(f"backend: {chosen!r} is not in this build of MLX, expected 'ring'")
    return chosen


def _reserve_port(address: str) -> socket.socket:
    """Bind a free port at `address`, and do not listen: MLX may bind it too, and no other program may."""
    reserved = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        reserved.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        reserved.bind((address, 0))
    except OSError as error:
        reserved.close()
        raise ArgumentError(f"--interface or --hosts: {address} is not an address of this host ({error})") from None
    return reserved


def _connect(backend: str, rank: int, members: Sequence[Address], first: int) -> mx.distributed.Group:
    with tempfile.TemporaryDirectory(prefix="ringattn-") as folder:
        file = Path(folder, "hosts.json")
        variables, content = row_environment(backend, rank, members, first, os.environ.get(RDMA))
        file.write_text(json.dumps(content))
        with _environment({name: value or str(file) for name, value in variables.items()}):
            try:
                group = mx.distributed.init(strict=True, backend=backend)
            except (RuntimeError, ValueError) as error:
                why = " ".join(str(error).split())
                raise RingError(
                    f"mx.distributed could not connect a row with its backend {backend!r}: {why}"
                ) from error
    if (group.size(), group.rank()) != (len(members), rank):
        raise RingError(
            f"mx.distributed runs in this process already, as rank {group.rank()} of {group.size()}, expected rank "
            f"{rank} of {len(members)}: give that group as group=, or make the grid first"
        )
    return group


def row_environment(
    backend: str, rank: int, members: Sequence[Address], first: int, rdma: str | None
) -> tuple[dict[str, str], list]:
    """The variables from which MLX reads a row, and the content of the file that one of them names.

    Args:
        backend: One of `BACKENDS`.
        rank: This rank's place in the row.
        members: The address and port of each rank of the row.
        first: The first rank of the row, in the whole ring.
        rdma: JSON of the RDMA devices of each host towards all hosts, for ``"jaccl"``.

    Returns:
        The variables, with an empty value for the name of the file, and its content.

    Raises:
        ArgumentError: The RDMA devices of this row are not known.
    """
    places = [f"{address}:{port}" for address, port in members]
    if backend == "ring":
        return {"MLX_RANK": str(rank), "MLX_HOSTFILE": ""}, [[place] for place in places]
    if backend == "nccl":
        host, port = members[0]
        size = str(len(members))
        return {"MLX_RANK": str(rank), "MLX_WORLD_SIZE": size, "NCCL_HOST_IP": host, "NCCL_PORT": str(port)}, []
    own = range(first, first + len(members))
    try:
        table = json.loads(rdma or "")
        devices = [[table[i][j] for j in own] for i in own]
    except (ValueError, LookupError, TypeError):
        raise ArgumentError(
            f"backend: 'jaccl', and the RDMA devices of ranks {own[0]} to {own[-1]} are not known, expected a host "
            "file of MLX with 'rdma' for each host, one rank a host"
        ) from None
    return {"MLX_RANK": str(rank), "MLX_JACCL_COORDINATOR": places[0], "MLX_IBV_DEVICES": ""}, devices


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while: `init` would take them for those of a launcher."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

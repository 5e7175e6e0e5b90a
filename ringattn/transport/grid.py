"""A grid of ranks: rows share the weights of a model, columns share its context."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import mlx.core as mx

from ..core.validation import check_int
from ..errors import ArgumentError, ArgumentTypeError
from .base import Ring
from .consensus import agree, raise_on_all_ranks
from .interface import Transport
from .mlx.row import CALL, open_row


@dataclass(frozen=True)
class Grid:
    """Ranks in rows and columns. `ringattn.grid` makes it. A context manager: leaving it closes the column.

    Ranks next to each other are a row: with ``tensor=2``, ranks 0 and 1 are row 0, and ranks 0, 2, 4, ... column 0. The
    ranks of a row share the weights and hold the same tokens. The ranks of a column hold the same part of the weights,
    and a part of the tokens each.

    **Order of communication.** Sums over a row and calls of a column's ring wait for other ranks. Nobody waits in a
    circle as long as every rank does the same operations in the same order: the rank that is least far in this order
    waits for nobody. A call of the ring evaluates its keys and values before its first exchange, and with them all sums
    that they depend on. So the order is that of the program, although MLX evaluates late. A sum whose result one rank
    of a row evaluates must be evaluated by the other ranks of this row before their next call of a ring.

    **Failures.** Nothing can interrupt a sum over a row, and by itself it waits for ever for a rank that has died or
    hangs. The heartbeats of `ring` find that rank. A process that does not return from a sum then ends with the cause.

    Attributes:
        ring: All ranks.
        column: The ring of this rank's column, over which the context is spread.
        row: The group of this rank's row, for mlx-lm's ``model.shard``; ``None`` where `tensor` is 1.
        tensor: Ranks in a row.
    """

    ring: Ring
    column: Ring
    row: mx.distributed.Group | None
    tensor: int

    @property
    def rows(self) -> int:
        """The number of rows, and of ranks in a column."""
        return self.ring.size // self.tensor

    def close(self) -> None:
        """Close the column. The ring of all ranks stays open."""
        if self.column is not self.ring:
            self.column.close()

    def __enter__(self) -> Grid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.column is not self.ring:
            self.column.__exit__(kind, error, traceback)


def grid(
    ring: Ring, tensor: int | None = None, *, group: mx.distributed.Group | None = None, backend: str | None = None
) -> Grid:
    """Arrange the ranks of `ring` in rows of `tensor` ranks that share a model's weights. Collective.

    Args:
        ring: All ranks, of ``ringattn.init("mpi")``.
        tensor: Ranks in a row: a divisor of the ring's size. Default: the size of `group`, else 1.
        group: A group of `mx.distributed` that joins this rank's row already. Default: connect the row.
        backend: The backend of `mx.distributed` in the rows: ``"ring"`` (TCP), ``"jaccl"`` (RDMA over Thunderbolt) or
            ``"nccl"``. Default: ``"jaccl"`` where the launcher has read RDMA devices from a host file, else ``"ring"``.

    Raises:
        ArgumentError: `tensor` does not divide the ranks, the groups have different sizes or do not join neighbours, or
            a backend is not available. Every rank raises it.
        RingError: A row could not be connected.
    """
    if not isinstance(ring, Transport):
        raise ArgumentTypeError(f"ring: {type(ring).__name__}, expected a ring of ringattn.init")
    with raise_on_all_ranks(ring, CALL):
        size = group.size() if group is not None else 1
        tensor = size if tensor is None else check_int("tensor", tensor, 1)
        if ring.size % tensor:
            raise ArgumentError(f"tensor: {tensor}, expected a divisor of {ring.size}, the number of ranks")
        if group is not None and size != tensor:
            raise ArgumentError(f"group: {size} ranks, expected {tensor}, the ranks of a row")
        if tensor > 1 and ring.backend == "mlx":
            raise ArgumentError("ring: of backend 'mlx', expected 'mpi': mx.distributed is needed for the rows")
    agree(ring, CALL, (("tensor", str(tensor)), ("group", "given" if group is not None else "None")))
    if tensor == 1:
        return Grid(ring, ring, None, 1)
    ring.guard_uninterruptible_calls()
    if group is None:
        group = open_row(ring, tensor, backend)
    _check_row(ring, group)
    column = ring.split(ring.rank % tensor)
    assert column is not None
    return Grid(ring, column, group, tensor)


def _check_row(ring: Transport, group: mx.distributed.Group) -> None:
    """Raise on all ranks unless `group` joins neighbours, in their order."""
    first = ring.rank // group.size() * group.size()
    expected = list(range(first, first + group.size()))
    with raise_on_all_ranks(ring, CALL):
        found = mx.distributed.all_gather(mx.array([ring.rank]), group=group).tolist()
        if found != expected:
            raise ArgumentError(f"group: joins ranks {found}, expected {expected}, which are neighbours")
    agree(ring, CALL)

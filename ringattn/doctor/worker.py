"""Program of every rank of ``ringattn doctor``.

``python -m ringattn.doctor.worker SECONDS DTYPE HEADS KV_HEADS DIM TENSOR [HOST,HOST,...]``: the last where there are
several hosts; the environment then says where the doctor listens, see `connectivity`.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict

import mlx.core as mx

from ..errors import RingAttentionError
from ..launcher.rank_wrapper import launched_rank
from ..ring.call import check_ring
from ..transport import init
from ..transport.environment import launched_by
from ..transport.grid import grid
from .compute_speed import measure
from .connectivity import ENDPOINT, find_failed_connections
from .host_info import collect
from .link_speed import measure_hop, measure_link, pairs
from .records import write_record
from .row_speed import measure_row


def main() -> int:
    """Measure, and write records. Return the exit status."""
    seconds, dtype, heads, kv_heads, head_dim, tensor, *several = sys.argv[1:]
    signal.alarm(int(seconds))  # end this process at last even if its parent is gone
    rank = int(launched_rank())
    try:
        write_record(rank, doing="looking at its host", host=asdict(collect()))
        write_record(rank, doing="timing its kernels")
        write_record(rank, speeds=asdict(measure(getattr(mx, dtype), (int(heads), int(kv_heads)), int(head_dim))))
        if several and not _reach_all(rank, *several):
            return 1  # MPI would wait for ever for a connection
        if launched_by() == "mpi":
            _measure_ring(rank, int(tensor))
    except RingAttentionError as error:
        write_record(rank, problem=" ".join(str(error).split()))
        return 1
    write_record(rank, done=True)
    return 0


def _reach_all(rank: int, hosts: str) -> bool:
    """Whether every host can reach every other."""
    write_record(rank, doing="connecting to all other hosts")
    failed_connections = find_failed_connections(os.environ[ENDPOINT], rank, hosts.split(","))
    if rank == 0:  # all ranks have the same list
        write_record(rank, failed_connections=[asdict(failed) for failed in failed_connections])
    return not failed_connections


def _measure_ring(rank: int, tensor: int) -> None:
    from ..transport.mpi.library import library

    write_record(rank, doing="starting MPI")
    mpi = library()
    write_record(rank, doing="opening the ring", mpi=asdict(mpi))
    if mpi.threads != "multiple":
        return  # no ring can be opened, and the record has the reason
    with check_ring(init()) as ring:
        for ranks in pairs(ring.size):
            write_record(rank, doing=f"measuring link {ranks[0]}-{ranks[1]}")
            link = measure_link(ring, ranks)
            if link is not None and ring.rank == ranks[0]:
                write_record(rank, link=asdict(link))
        if ring.size > 1:
            write_record(rank, doing="measuring a hop of all ranks")
            write_record(rank, hop=measure_hop(ring))  # the same on all ranks
        ring.barrier()
        if tensor > 1 and ring.size % tensor == 0:  # hosts may have been left out
            write_record(rank, doing="connecting the rows over mx.distributed")
            with grid(ring, tensor) as rows:
                write_record(rank, doing="measuring sums over the rows")
                row = measure_row(rows)
            if ring.rank == row.ranks[0]:
                write_record(rank, row=asdict(row))


if __name__ == "__main__":
    sys.exit(main())

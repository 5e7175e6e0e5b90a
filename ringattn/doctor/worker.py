"""What every rank runs for ``ringattn doctor``.

``python -m ringattn.doctor.worker SECONDS DTYPE HEADS KV_HEADS DIM [HOST,HOST,...]``: the last where there are several
hosts; the environment then says where the doctor listens, see `connectivity`.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict

import mlx.core as mx

from ..errors import RingAttentionError
from ..launcher.rank_wrapper import launched_rank
from ..ring.arguments import check_ring
from ..transport import init
from ..transport.environment import launched_by
from .compute_speed import measure
from .connectivity import ENDPOINT, find_failed_connections
from .host_info import collect
from .link_speed import measure_hop, measure_link, pairs
from .records import say


def main() -> int:
    """Measure and tell; the exit status."""
    seconds, dtype, heads, kv_heads, head_dim, *several = sys.argv[1:]
    signal.alarm(int(seconds))  # should whoever started this be gone, nothing stays behind, whatever it waits for
    rank = int(launched_rank())
    try:
        say(rank, doing="looking at its host", facts=asdict(collect()))
        say(rank, doing="timing its kernels")
        say(rank, speeds=asdict(measure(getattr(mx, dtype), (int(heads), int(kv_heads)), int(head_dim))))
        if several and not _reach_all(rank, *several):
            return 1  # MPI would wait for ever
        if launched_by() == "mpi":
            _measure_ring(rank)
    except RingAttentionError as error:
        say(rank, problem=" ".join(str(error).split()))
        return 1
    say(rank, done=True)
    return 0


def _reach_all(rank: int, hosts: str) -> bool:
    """Whether every host can reach every other."""
    say(rank, doing="connecting to all other hosts")
    dead = find_failed_connections(os.environ[ENDPOINT], rank, hosts.split(","))
    if rank == 0:  # every rank knows
        say(rank, dead=[asdict(way) for way in dead])
    return not dead


def _measure_ring(rank: int) -> None:
    from ..transport.mpi.library import library

    say(rank, doing="starting MPI")
    mpi = library()
    say(rank, doing="opening the ring", mpi=asdict(mpi))
    if mpi.threads != "multiple":
        return  # no ring can be opened, and the doctor knows why
    with check_ring(init()) as ring:
        for ranks in pairs(ring.size):
            say(rank, doing=f"measuring link {ranks[0]}-{ranks[1]}")
            link = measure_link(ring, ranks)
            if link is not None and ring.rank == ranks[0]:
                say(rank, link=asdict(link))
        if ring.size > 1:
            say(rank, doing="measuring a hop of all ranks")
            say(rank, hop=measure_hop(ring))  # every rank finds the same
        ring.barrier()


if __name__ == "__main__":
    sys.exit(main())

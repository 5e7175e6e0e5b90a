"""Checks that nothing slows a ring down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from ...native import tf32
from ...reporting.tables import format_number
from ..host_info import HostInfo
from .examination import Examination, Finding

SLOW_BLAS = 1 / 3  # of NumPy's speed
BUSY = 0.5  # load average per core before the examination
DISTURBED = 2.0  # ratio of the median to the best of equal measurements
SLOW_LINK = 0.6  # of the median link
MANY_TOKENS = 16384  # per rank: few users have contexts of that length


def _metal(exam: Examination) -> Iterator[Finding]:
    """Macs without the Metal kernel."""
    for number, rank in exam.first_ranks():
        if rank.host and rank.host.system.startswith("macOS") and rank.host.kernel != "metal":
            what = f"attention runs on the {rank.host.kernel!r} kernel, not on Metal"
            yield Finding(False, exam.label(number), what, "use an arm64 Python and the mlx wheel for Apple silicon")


def _precision(exam: Examination) -> Iterator[Finding]:
    """Hosts that multiply float32 in less than float32."""
    for number, rank in exam.first_ranks():
        if rank.host and rank.host.float32 != "full":
            what = f"MLX multiplies float32 in {rank.host.float32}: gradients and backend 'reference' are less exact"
            yield Finding(False, exam.label(number), what, f"set {tf32.VARIABLE}=0 there")


def _busy(exam: Examination) -> Iterator[Finding]:
    """Hosts with other work, whose measured speeds are too low."""
    for number, rank in exam.first_ranks():
        assert rank.host is not None
        signs = []
        if rank.host.load > BUSY:
            signs.append(f"load average {rank.host.load:.1f} a core before the doctor began")
        if (spread := _spread(exam, rank.host)) > DISTURBED:
            signs.append(f"equal measurements differ {spread:.1f}-fold")
        if signs:
            remedy = "its speeds here are too low: end what else runs there (see top), and run the doctor again"
            yield Finding(False, exam.label(number), f"busy: {', '.join(signs)}", remedy)


def _spread(exam: Examination, info: HostInfo) -> float:
    """Largest spread of the ranks on a host; 1 where these have more threads than cores and disturb each other."""
    ranks = [rank for rank in exam.reports.ranks.values() if rank.host and rank.host.host == info.host]
    spreads = [rank.speeds.spread for rank in ranks if rank.speeds]
    return max(spreads, default=1.0) if len(ranks) * info.threads <= info.cores else 1.0


def _blas(exam: Examination) -> Iterator[Finding]:
    """Hosts whose MLX multiplies matrices far more slowly than NumPy."""
    for number, rank in exam.first_ranks():
        if rank.host and rank.speeds and not rank.host.gpu and rank.speeds.mlx < SLOW_BLAS * rank.speeds.numpy:
            mlx, numpy = (format_number(flops / 1e9) for flops in (rank.speeds.mlx, rank.speeds.numpy))
            what = f"MLX multiplies float32 at {mlx} GFLOP/s, NumPy at {numpy}"
            remedy = rank.host.blas_advice or "see what else runs there, and run the doctor again"
            yield Finding(False, exam.label(number), what, remedy)


def _links(exam: Examination) -> Iterator[Finding]:
    """Links that are much slower than the median link."""
    usual = median(link.slowest for link in exam.reports.links) if exam.reports.links else 0.0
    for link in exam.reports.links:
        if link.slowest < SLOW_LINK * usual:
            speed, others = (format_number(speed / 1e9, 2) for speed in (link.slowest, usual))
            what = f"{speed} GB/s, where others have {others}: all hops wait for it"
            yield Finding(False, f"link {link.ranks[0]}-{link.ranks[1]}", what, "look at its cable and its interface")


def _rows(exam: Examination) -> Iterator[Finding]:
    """Rows whose links are slower than they would be if the list of hosts began elsewhere."""
    speeds = {link.ranks[0]: link.slowest for link in exam.reports.links}
    if exam.tensor == 1 or exam.size <= exam.tensor or len(speeds) != exam.size:
        return
    slowest = [slowest_in_rows(speeds, exam.tensor, first) for first in range(exam.tensor)]
    best = slowest.index(max(slowest))
    if slowest[0] < SLOW_LINK * slowest[best]:
        now, then = (format_number(speed / 1e9, 2) for speed in (slowest[0], slowest[best]))
        what = f"the slowest link within a row of {exam.tensor} has {now} GB/s, and would have {then} in another order"
        yield Finding(False, "rows", what, f"begin the list of hosts with {exam.label(best)}")


def slowest_in_rows(speeds: Mapping[int, float], tensor: int, first: int) -> float:
    """Least speed of a link within a row of `tensor` ranks, if rank `first` is the first one of a row.

    Args:
        speeds: Speed of the link from each rank to its right neighbour.
        tensor: Ranks in a row.
        first: First rank of a row.
    """
    return min(speed for rank, speed in speeds.items() if (rank - first) % tensor < tensor - 1)


def _context_length(exam: Examination) -> Iterator[Finding]:
    """Links that need very long contexts to hide transfers."""
    if exam.break_even is not None and exam.break_even > MANY_TOKENS:
        what = f"transfers hide behind compute only above {exam.break_even:,} tokens per rank"
        yield Finding(False, "links", what, "use faster ones (see launch/README.md), or longer contexts")


CHECKS = (_metal, _precision, _busy, _blas, _links, _rows, _context_length)

"""What is wrong with a cluster, and what to do about it: a pure function of what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from ..native import tf32
from ..transport.handshake import DIFFERS
from .examination import Examination
from .host_info import Facts
from .records import Rank

INSTALL = "pip install 'ringattn[mpi]'"
SLOW_BLAS = 1 / 3  # of NumPy's speed
BUSY = 0.5  # of a host's cores had work before the doctor came
DISTURBED = 2.0  # times as long as the best of equal measurements, for the median of them
SLOW_LINK = 0.6  # of the median link
MANY_TOKENS = 16384  # per rank: a context of as many is not what everybody has

SAME = {  # what has to be the same on all ranks -> what to do where it is not
    "python": "put the virtual environment at the same path on all hosts",
    "ringattn": "install the same version on all hosts",
    "mlx": "install the same mlx on all hosts: pip install mlx==VERSION",
    "mpi4py": "install the same mpi4py on all hosts: pip install mpi4py==VERSION",
}
ALIKE = {  # what had better be
    "python_version": "use the same Python everywhere",
    "numpy": "install the same numpy on all hosts",
}


def rounded(value: float, decimals: int = 0) -> str:
    """A measured number with so many decimals, or with two digits where these would hide it: never 0."""
    return f"{value:,.{decimals}f}" if value >= 10**-decimals else f"{value:.2g}"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        fatal: Whether it keeps rings from working; otherwise it costs speed.
        where: Which ranks, which link.
        what: What was found there.
        remedy: What to do about it.
    """

    fatal: bool
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.where}: {self.what}; {self.remedy}"


def examine(seen: Examination) -> list[Finding]:
    """Everything that is wrong, what is fatal first."""
    checks = (
        _hosts,
        _ways,
        _launch,
        _ranks,
        _threads,
        _alone,
        _differences,
        _metal,
        _precision,
        _busy,
        _blas,
        _links,
        _tokens,
    )
    found = [finding for check in checks for finding in check(seen)]
    return sorted(found, key=lambda finding: not finding.fatal)


def _hosts(seen: Examination) -> Iterator[Finding]:
    """Those on which no rank can start."""
    for trouble in seen.troubles:
        yield Finding(True, f"host {trouble.host.ssh}", trouble.what, trouble.remedy)


def _ways(seen: Examination) -> Iterator[Finding]:
    """Pairs of hosts between which nothing passes, each once, in the words of the first ranks that tried."""
    pairs: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for way in seen.told.dead:
        ends = seen.host(way.caller), seen.host(way.peer)
        pairs.setdefault(tuple(sorted(ends)), {}).setdefault(ends, way.why)
    for pair, whys in pairs.items():
        ways = " and ".join(f"from {caller} to {peer} ({why})" for (caller, peer), why in whys.items())
        what = f"no TCP connection {ways}, and MPI needs one between every two hosts"
        remedy = "look at the cables, addresses and routes between these two, and at their firewalls"
        yield Finding(True, " and ".join(pair), what, remedy)


def _launch(seen: Examination) -> Iterator[Finding]:
    if seen.unlaunched:
        yield Finding(True, "MPI", seen.unlaunched.removesuffix(f": {INSTALL}"), f"{INSTALL}, or give --mpiexec")
    if seen.mismatch:
        what, _, remedy = seen.mismatch.rpartition("; ")
        yield Finding(True, "MPI", what, remedy)
    if seen.ended is None:
        slow = {number: rank.doing for number, rank in seen.told.ranks.items() if not rank.done}
        places = ", ".join(f"{seen.name(number)} was {doing}" for number, doing in slow.items())
        remedy = "look at that host and its firewall, or give --timeout more seconds"
        yield Finding(True, "launch", f"not finished after {seen.seconds:g} s ({places or 'no rank began'})", remedy)


def _ranks(seen: Examination) -> Iterator[Finding]:
    """Those that did not start, or not finish."""
    if seen.unlaunched or not seen.size:
        return
    because = f" ({seen.launcher})" if seen.launcher else ""
    missing = [number for number in range(seen.size) if number not in seen.told.ranks]
    if len(missing) == seen.size and seen.ended is not None:
        yield Finding(True, "launch", f"no rank started{because}", _reach(seen, *missing))
        return
    if missing:
        yield Finding(True, seen.names(missing), f"did not start{because}", _reach(seen, *missing))
    problems = {rank.problem: number for number, rank in reversed(seen.told.ranks.items()) if rank.problem}
    for problem, number in reversed(problems.items()):  # what several ranks say alike is told once
        if problem.startswith(DIFFERS):
            what, _, remedy = problem.removeprefix(DIFFERS).rpartition("; ")
            if _versions_agree(seen):  # else `_differences` says so
                yield Finding(True, "ringattn", f"differs: {what}", remedy)
        else:
            yield Finding(True, seen.name(number), problem, _mend(seen.told.ranks[number]))
    ended = {n: rank.doing for n, rank in seen.told.ranks.items() if not (rank.done or rank.problem)}
    if ended and seen.ended is not None and not seen.told.dead:
        what = f"ended while {' and '.join(dict.fromkeys(ended.values()))}{because}"
        yield Finding(
            True, seen.names(list(ended)), what, "run ringattn verify there, and see what its system log says"
        )


def _mend(rank: Rank) -> str:
    """What to try where a rank told of a problem."""
    if rank.doing.startswith("connecting"):
        return "look at the firewall of the machine that starts the ranks, and at the way there"
    if rank.doing.startswith("measuring"):
        return "look at that link: its cable, its interface, its addresses, the firewalls"
    return f"see whether MPI works there: {INSTALL}"


def _reach(seen: Examination, *numbers: int) -> str:
    """What to try where ranks did not start."""
    hosts = list(dict.fromkeys(seen.hosts[number] for number in numbers if number < len(seen.hosts)))
    # Where one host keeps all ranks from starting, the launcher's words may say which.
    hosts = [
        host for host in hosts if re.search(rf"(?<![\w.@-]){re.escape(host)}(?![\w-]|\.\w)", seen.launcher)
    ] or hosts
    if not hosts:
        return "see whether python -c 'import ringattn' works"
    return f"see whether `ssh {' / '.join(hosts)} true` works without a password, and ringattn is installed there"


def _threads(seen: Examination) -> Iterator[Finding]:
    for number, rank in seen.told.ranks.items():
        if rank.mpi and rank.mpi.threads != "multiple":
            what = f"MPI gives thread level {rank.mpi.threads!r}, and rings need 'multiple'"
            remedy = f"unset MPI4PY_RC_THREAD_LEVEL, or use an MPI that has it: {INSTALL}"
            yield Finding(True, seen.name(number), what, remedy)


def _alone(seen: Examination) -> Iterator[Finding]:
    """Under the mpiexec of another MPI every rank is a job of its own."""
    if seen.mismatch:
        return  # that says it already
    for number, rank in seen.told.ranks.items():
        if rank.mpi and rank.mpi.size != seen.size:
            what = f"{rank.mpi.version} sees {rank.mpi.size} of {seen.size} ranks: mpiexec belongs to another MPI"
            yield Finding(True, seen.name(number), what, "keep one MPI per virtual environment, or give --mpiexec")


def _differences(seen: Examination) -> Iterator[Finding]:
    facts = {number: rank.facts for number, rank in seen.told.ranks.items() if rank.facts}
    for fatal, names in ((True, SAME), (False, ALIKE)):
        for name, remedy in names.items():
            values = {number: str(getattr(one, name)) for number, one in facts.items()}
            yield from _unequal(seen, fatal, name.replace("_", " "), values, remedy)
    flavours = {number: rank.mpi.flavour for number, rank in seen.told.ranks.items() if rank.mpi}
    yield from _unequal(seen, True, "MPI", flavours, f"install the same MPI on all hosts: {INSTALL}")
    if _versions_agree(seen):  # else that has been said
        codes = {number: one.code for number, one in facts.items()}
        yield from _unequal(seen, True, "the source of ringattn", codes, "bring all checkouts to the same commit")


def _versions_agree(seen: Examination) -> bool:
    """Whether all hosts seem to have the same version of ringattn installed."""
    return len({rank.facts.ringattn for rank in seen.told.ranks.values() if rank.facts}) < 2


def _unequal(seen: Examination, fatal: bool, name: str, values: dict[int, str], remedy: str) -> Iterator[Finding]:
    """A finding where not all ranks have the same."""
    groups: dict[str, list[int]] = {}
    for number, value in values.items():
        groups.setdefault(value, []).append(number)
    if len(groups) > 1:
        told = ", ".join(f"{value} on {seen.names(numbers)}" for value, numbers in groups.items())
        yield Finding(fatal, name, f"differs: {told}", remedy)


def _metal(seen: Examination) -> Iterator[Finding]:
    for number, rank in _by_host(seen):
        if rank.facts and rank.facts.system.startswith("macOS") and rank.facts.kernel != "metal":
            what = f"attention runs on the {rank.facts.kernel!r} kernel, not on Metal"
            yield Finding(False, seen.name(number), what, "use an arm64 Python and the mlx wheel for Apple silicon")


def _precision(seen: Examination) -> Iterator[Finding]:
    for number, rank in _by_host(seen):
        if rank.facts and rank.facts.float32 != "full":
            what = f"MLX multiplies float32 in {rank.facts.float32}: gradients and backend 'reference' are less exact"
            yield Finding(False, seen.name(number), what, f"set {tf32.VARIABLE}=0 there")


def _busy(seen: Examination) -> Iterator[Finding]:
    """Hosts where something else runs, so that what was measured is less than they can do."""
    for number, rank in _by_host(seen):
        assert rank.facts is not None
        signs = []
        if rank.facts.load > BUSY:
            signs.append(f"load average {rank.facts.load:.1f} a core before the doctor began")
        if (spread := _spread(seen, rank.facts)) > DISTURBED:
            signs.append(f"equal measurements differ {spread:.1f}-fold")
        if signs:
            remedy = "its speeds here are too low: end what else runs there (see top), and run the doctor again"
            yield Finding(False, seen.name(number), f"busy: {', '.join(signs)}", remedy)


def _spread(seen: Examination, facts: Facts) -> float:
    """The largest spread of the ranks on a host; 1 where they have more threads than cores and disturb each other."""
    ranks = [rank for rank in seen.told.ranks.values() if rank.facts and rank.facts.host == facts.host]
    spreads = [rank.speeds.spread for rank in ranks if rank.speeds]
    return max(spreads, default=1.0) if len(ranks) * facts.threads <= facts.cores else 1.0


def _blas(seen: Examination) -> Iterator[Finding]:
    for number, rank in _by_host(seen):
        if rank.facts and rank.speeds and not rank.facts.gpu and rank.speeds.mlx < SLOW_BLAS * rank.speeds.numpy:
            mlx, numpy = (rounded(flops / 1e9) for flops in (rank.speeds.mlx, rank.speeds.numpy))
            what = f"MLX multiplies float32 at {mlx} GFLOP/s, NumPy at {numpy}"
            remedy = rank.facts.blas_advice or "see what else runs there, and run the doctor again"
            yield Finding(False, seen.name(number), what, remedy)


def _by_host(seen: Examination) -> Iterator[tuple[int, Rank]]:
    """The first rank of every host: what is true of a host is told once."""
    hosts: set[str] = set()
    for number, rank in seen.told.ranks.items():
        if rank.facts and rank.facts.host not in hosts:
            hosts.add(rank.facts.host)
            yield number, rank


def _links(seen: Examination) -> Iterator[Finding]:
    usual = median(link.slowest for link in seen.told.links) if seen.told.links else 0.0
    for link in seen.told.links:
        if link.slowest < SLOW_LINK * usual:
            speed, others = (rounded(speed / 1e9, 2) for speed in (link.slowest, usual))
            what = f"{speed} GB/s, where others have {others}: all hops wait for it"
            yield Finding(False, f"link {link.ranks[0]}-{link.ranks[1]}", what, "look at its cable and its interface")


def _tokens(seen: Examination) -> Iterator[Finding]:
    if seen.break_even is not None and seen.break_even > MANY_TOKENS:
        what = f"transfers hide behind compute only above {seen.break_even:,} tokens per rank"
        yield Finding(False, "links", what, "use faster ones (see launch/README.md), or longer contexts")

"""Facts about a cluster before the diagnosis, and the findings that the diagnosis makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...launcher.preflight import Trouble
from ..breakeven import AttentionModel, break_even
from ..link_speed import LinkSpeed
from ..records import RankReport, RankReports


@dataclass
class Examination:
    """Reports of the ranks, and the result of starting them.

    Attributes:
        size: Number of ranks to start on hosts that can be reached; 0 without such a host.
        reports: Reports of all ranks.
        model: Attention whose hops are judged.
        hosts: Hosts of the ranks as the user named them; empty for this machine.
        tensor: Number of neighbours that share a model's weights.
        troubles: Hosts without ranks, and why.
        launch_problem: Why no ring was started, with the remedy.
        mpi_mismatch: Message that mpiexec and the MPI library do not belong together, with the remedy.
        exit_status: Exit status of the launch; ``None`` after the time limit.
        time_limit: Time limit of the launch in seconds.
        launcher_message: Error message of the launcher.
    """

    size: int
    reports: RankReports
    model: AttentionModel = field(default_factory=AttentionModel)
    hosts: tuple[str, ...] = ()
    tensor: int = 1
    troubles: tuple[Trouble, ...] = ()
    launch_problem: str | None = None
    mpi_mismatch: str | None = None
    exit_status: int | None = 0
    time_limit: float = 0.0
    launcher_message: str = ""

    def label(self, *ranks: int) -> str:
        """Ranks with their hosts: ``rank 0 (mac0)``, ``ranks 0, 2, 3 (mac0, mac1)``."""
        hosts = ", ".join(dict.fromkeys(filter(None, map(self.host, ranks))))
        numbers = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        return f"{numbers} ({hosts})" if hosts else numbers

    def host(self, rank: int) -> str:
        """Host name of a rank, as the host reports it or else as the user gave it; empty where neither is known."""
        info = self.reports.ranks[rank].host if rank in self.reports.ranks else None
        return info.host if info else self.hosts[rank] if rank < len(self.hosts) else ""

    def first_ranks(self) -> Iterator[tuple[int, RankReport]]:
        """First rank of every host, for findings that hold for a whole host."""
        hosts: set[str] = set()
        for number, rank in self.reports.ranks.items():
            if rank.host and rank.host.host not in hosts:
                hosts.add(rank.host.host)
                yield number, rank

    @property
    def slowest_link(self) -> LinkSpeed | None:
        """Link with the least bandwidth in any direction."""
        return min(self.reports.links, key=lambda link: link.slowest, default=None)

    @property
    def break_even(self) -> int | None:
        """Break-even tokens per rank, from the slowest rank and the bandwidth of a hop with all links in use."""
        flops = [rank.speeds.attention for rank in self.reports.ranks.values() if rank.speeds]
        if not flops or not self.reports.hop:
            return None
        latency = max((link.latency for link in self.reports.links), default=0.0)
        return break_even(min(flops), self.reports.hop, latency, self.model)


@dataclass(frozen=True)
class Finding:
    """Problem of a cluster.

    Attributes:
        fatal: Whether the problem keeps rings from working; otherwise it costs speed.
        where: Ranks, hosts or link with the problem.
        what: Description of the problem.
        remedy: Advice.
    """

    fatal: bool
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.where}: {self.what}; {self.remedy}"


def differences(exam: Examination, fatal: bool, name: str, values: dict[int, str], remedy: str) -> Iterator[Finding]:
    """Finding that `values`, by rank, are not all equal."""
    groups: dict[str, list[int]] = {}
    for number, value in values.items():
        groups.setdefault(value, []).append(number)
    if len(groups) > 1:
        listed = ", ".join(f"{value} on {exam.label(*numbers)}" for value, numbers in groups.items())
        yield Finding(fatal, name, f"differs: {listed}", remedy)


def join_words(parts: Sequence[str]) -> str:
    """Different `parts` in their order, with "and" between them."""
    return " and ".join(dict.fromkeys(parts))

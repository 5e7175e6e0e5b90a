"""All that is known of a cluster: what its ranks have said, and what became of the attempt to start them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..launcher.preflight import Trouble
from .breakeven import Model, break_even
from .link_speed import Link
from .records import Told


@dataclass
class Examination:
    """All that is known.

    Attributes:
        size: How many ranks were to start, on hosts that can be reached; 0 where there is none.
        told: What they said.
        model: The attention whose hops are judged.
        hosts: Where the ranks were to run, as the user named it; empty for this machine.
        troubles: Hosts without ranks, and why.
        unlaunched: Why no ring was started, with the remedy.
        mismatch: That mpiexec and the MPI library do not belong together, with the remedy.
        ended: The exit status of the launch; ``None`` where it took too long.
        seconds: How long was too long.
        launcher: The launcher's own words about what went wrong.
    """

    size: int
    told: Told
    model: Model = field(default_factory=Model)
    hosts: tuple[str, ...] = ()
    troubles: tuple[Trouble, ...] = ()
    unlaunched: str | None = None
    mismatch: str | None = None
    ended: int | None = 0
    seconds: float = 0.0
    launcher: str = ""

    def name(self, rank: int) -> str:
        """A rank for people."""
        return self.names([rank])

    def names(self, ranks: Sequence[int]) -> str:
        """Ranks for people: ``rank 0 (mac0)``, ``ranks 0, 2, 3 (mac0, mac1)``."""
        hosts = ", ".join(dict.fromkeys(filter(None, map(self.host, ranks))))
        numbers = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        return f"{numbers} ({hosts})" if hosts else numbers

    def host(self, rank: int) -> str:
        """The name of its host, in its own words or the user's; empty where neither is known."""
        facts = self.told.ranks[rank].facts if rank in self.told.ranks else None
        return facts.host if facts else self.hosts[rank] if rank < len(self.hosts) else ""

    @property
    def slowest(self) -> Link | None:
        """The link with the least bandwidth, in whichever direction."""
        return min(self.told.links, key=lambda link: link.slowest, default=None)

    @property
    def break_even(self) -> int | None:
        """Tokens per rank, by the slowest rank and by what links carry when all are used at once."""
        flops = [rank.speeds.attention for rank in self.told.ranks.values() if rank.speeds]
        if not flops or not self.told.hop:
            return None
        latency = max((link.latency for link in self.told.links), default=0.0)
        return break_even(min(flops), self.told.hop, latency, self.model)

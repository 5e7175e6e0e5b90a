"""Records that ranks write for the doctor: lines on standard output, which every launcher forwards from every host.

Each line stands alone. A rank that fails does not lose the records before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..transport.mpi.library import Library
from .compute_speed import ComputeSpeeds
from .connectivity import FailedConnection
from .host_info import HostInfo
from .link_speed import LinkSpeed
from .row_speed import RowSpeed

MARK = "ringattn-doctor:"


@dataclass
class RankReport:
    """Report of one rank; ``None`` stands for what the rank did not reach."""

    host: HostInfo | None = None
    speeds: ComputeSpeeds | None = None
    mpi: Library | None = None
    problem: str | None = None  # that ended the rank, in one line
    doing: str = "starting"  # the last step that the rank began
    done: bool = False


@dataclass
class RankReports:
    """Parsed reports of all ranks."""

    ranks: dict[int, RankReport] = field(default_factory=dict)
    links: list[LinkSpeed] = field(default_factory=list)
    hop: float | None = None  # bytes per second that every rank sends while all send
    failed_connections: list[FailedConnection] = field(default_factory=list)  # these keep MPI from starting
    rows: list[RowSpeed] = field(default_factory=list)


def write_record(rank: int, **fields: Any) -> None:
    """Write a line in one system call, so that no other rank's output can split it."""
    os.write(1, f"{MARK}{json.dumps({'rank': rank, **fields})}\n".encode())


def parse_records(output: str) -> RankReports:
    """Read the lines of `write_record` and ignore any text before the mark, such as a launcher's prefix."""
    reports = RankReports()
    for record in _records(output):
        rank = reports.ranks.setdefault(record["rank"], RankReport())
        if "link" in record:
            reports.links.append(LinkSpeed(**{**record["link"], "ranks": tuple(record["link"]["ranks"])}))
        if "row" in record:
            reports.rows.append(RowSpeed(**{**record["row"], "ranks": tuple(record["row"]["ranks"])}))
        reports.failed_connections += [FailedConnection(**failed) for failed in record.get("failed_connections", ())]
        reports.hop = record.get("hop", reports.hop)
        for name, kind in (("host", HostInfo), ("speeds", ComputeSpeeds), ("mpi", Library)):
            if name in record:
                setattr(rank, name, kind(**record[name]))
        rank.problem = record.get("problem", rank.problem)
        rank.doing = record.get("doing", rank.doing)
        rank.done = record.get("done", rank.done)
    reports.rows.sort(key=lambda row: row.ranks)
    reports.ranks = dict(sorted(reports.ranks.items()))
    return reports


def _records(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                yield json.loads(text)
            except ValueError:
                continue  # incomplete, because the rank died

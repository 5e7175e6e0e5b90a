"""What the ranks say to the doctor: lines on standard output, which every launcher brings from every host.

Each line stands alone, so that what was found before a rank failed is not lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..transport.mpi.library import Library
from .compute_speed import Speeds
from .connectivity import FailedConnection
from .host_info import Facts
from .link_speed import Link

MARK = "ringattn-doctor:"


@dataclass
class Rank:
    """What one rank has said; ``None`` is what it has not come to."""

    facts: Facts | None = None
    speeds: Speeds | None = None
    mpi: Library | None = None
    problem: str | None = None  # what kept it from going on, in one line
    doing: str = "starting"  # what it began last
    done: bool = False


@dataclass
class Told:
    """What all ranks have said."""

    ranks: dict[int, Rank] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    hop: float | None = None  # bytes per second that every rank sends while all do
    dead: list[FailedConnection] = field(default_factory=list)  # because of which MPI was not started


def say(rank: int, **fields: Any) -> None:
    """One line, written at once, so that no other rank's gets into it."""
    os.write(1, f"{MARK}{json.dumps({'rank': rank, **fields})}\n".encode())


def read(output: str) -> Told:
    """Take in all lines that `say` wrote; what is before the mark, such as a launcher's prefix, does not matter."""
    told = Told()
    for record in _records(output):
        rank = told.ranks.setdefault(record["rank"], Rank())
        if "link" in record:
            told.links.append(Link(**{**record["link"], "ranks": tuple(record["link"]["ranks"])}))
        told.dead += [FailedConnection(**way) for way in record.get("dead", ())]
        told.hop = record.get("hop", told.hop)
        for name, kind in (("facts", Facts), ("speeds", Speeds), ("mpi", Library)):
            if name in record:
                setattr(rank, name, kind(**record[name]))
        rank.problem = record.get("problem", rank.problem)
        rank.doing = record.get("doing", rank.doing)
        rank.done = record.get("done", rank.done)
    told.ranks = dict(sorted(told.ranks.items()))
    return told


def _records(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                yield json.loads(text)
            except ValueError:
                continue  # cut off when its rank died

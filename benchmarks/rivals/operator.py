"""The operator: attention over 2 ranks with a core each, over the loopback interface and over a throttled link."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby, product
from pathlib import Path

from launch.virtual import Cluster, unavailable

from .environments import python_of
from .problem import Problem
from .results import OperatorRow, load, save
from .roster import FIRST, OURS, ROSTER, Rival
from .starting import FailedError, collect, plain_commands, ring_command

Rows = dict[tuple, OperatorRow]  # by their keys
LOOPBACK = "loopback"
LINKS = (LOOPBACK, "1gbit")
FEW = ((4096, 8, 8, 64), (4096, 8, 2, 128), (8192, 8, 2, 128))  # tokens, heads, key/value heads, head dimension
SLOW_CALLS = 2  # timed calls of a rival that is not fast
TIMEOUT = 300.0  # s of one run


def problems(whole: bool) -> Iterator[Problem]:
    """Problems to measure, those of one shape in a row: the shapes `FEW`, or all at each length if `whole` is set."""
    for tokens, (heads, kv_heads), dim in product((4096, 8192, 16384), ((8, 8), (8, 2)), (64, 128)):
        if whole or (tokens, heads, kv_heads, dim) in FEW:
            for gradient, causal in product((False, True), (False, True)):
                yield Problem(tokens, heads, kv_heads, dim, causal, gradient)


class Operator:
    """Measurement of rivals, in pieces of one shape over one link. What is in the file is not measured again.

    Args:
        links: `LOOPBACK`, and rates of links of the virtual cluster in units of tc.
        rounds: Number of rounds in which the fast rivals take turns.
        keep: Function that says which rivals to run.
        file: File for the results.
    """

    def __init__(self, links: Sequence[str], rounds: int, keep: Callable[[Rival], bool], file: Path):
        if (reason := unavailable()) and list(links) != [LOOPBACK]:
            print(f"Only over {LOOPBACK}: {reason}", flush=True)
            links = [LOOPBACK]
        self._links = links
        self._rounds = rounds
        self._keep = keep
        self._file = file
        self._rows: Rows = {row.key: row for row in load(file)["rows"]} if file.exists() else {}

    def run(self, wanted: Sequence[Problem], minutes: float) -> list[OperatorRow]:
        """Measure problems. Start no rival after `minutes`. Save the rows after each rival, and return all."""
        end = time.monotonic() + 60 * minutes
        shapes = [list(group) for _, group in groupby(wanted, lambda problem: problem.shape)]
        for link, problems in product(self._links, shapes):
            cores = nullcontext() if link == LOOPBACK else Cluster(2, rate=link, cores=1)
            with cores as cluster, tempfile.TemporaryDirectory() as folder:
                piece = Piece(problems, link, cluster, Path(folder), self._rows)
                for _ in piece.run(self._rounds, self._keep):
                    save(self._file, self._measured())
                    if time.monotonic() > end:
                        return self._measured()
        return self._measured()

    def _measured(self) -> list[OperatorRow]:
        return [row for row in self._rows.values() if row.measured]


class Piece:
    """Problems of one shape over one link. Each rival has one start for all problems.

    Args:
        problems: The problems.
        link: Name of the link.
        cluster: Virtual hosts; ``None`` for this machine itself.
        folder: Folder for references and results.
        rows: Rows of this and other pieces, to which those of this one are added.
    """

    def __init__(self, problems: Sequence[Problem], link: str, cluster: Cluster | None, folder: Path, rows: Rows):
        self._problems = problems
        self._link = link
        self._cluster = cluster
        self._folder = folder
        self._rows = rows

    def run(self, rounds: int, keep: Callable[[Rival], bool]) -> Iterator[Rival]:
        """Measure the rivals that `keep` names and that are not among the rows. Yield each when it is measured.

        The fast ones take turns, so that other work on the machine affects all alike.
        """
        here = [one for one in ROSTER if keep(one) and (self._cluster is None or one.ranks > 1)]
        missing = [one for one in here if self._missing(one)]
        if missing and missing[0] is not FIRST:
            self._start(FIRST, self._problems, None, calls=0)  # for the references
        fast = [one for one in missing if one.fast]
        for turn in range(rounds):
            for rival in fast:
                own = [problem for problem in self._problems if turn == 0 or not self._row(rival, problem).failed]
                self._attempt(rival, own, self._cluster)
                yield rival
        for rival in missing:
            if not rival.fast:
                self._attempt(rival, self._problems, self._cluster)
                yield rival

    def _missing(self, rival: Rival) -> bool:
        return any(rival.solves(one) and not self._row(rival, one).measured for one in self._problems)

    def _attempt(self, rival: Rival, wanted: Sequence[Problem], cluster: Cluster | None) -> None:
        """Measure problems with a rival. After a failure it is started again for the problems after that."""
        left = [problem for problem in wanted if rival.solves(problem)]
        for problem in left:
            self._row(rival, problem).failed = _too_large(rival, problem)
        left = [problem for problem in left if not self._row(rival, problem).failed]
        while left:
            done, reason = self._start(rival, left, cluster, None if rival.fast else SLOW_CALLS)
            for problem, ranks in zip(left, done):
                _add(self._row(rival, problem), ranks)
                print(self._row(rival, problem).line(), flush=True)
            left = left[len(done) :]
            if left and reason:
                self._row(rival, left[0]).failed = reason
                print(self._row(rival, left[0]).line(), flush=True)
                left = left[1:]

    def _row(self, rival: Rival, problem: Problem) -> OperatorRow:
        row = OperatorRow(self._link, problem, rival.title, rival.way)
        return self._rows.setdefault(row.key, row)

    def _start(
        self, rival: Rival, wanted: Sequence[Problem], cluster: Cluster | None, calls: int | None
    ) -> tuple[list[tuple[dict, ...]], str]:
        """Results of all ranks for the first problems, and the reason why the next one has none."""
        tasks = [
            {
                "problem": problem.as_dict(),
                "reference": str(self._reference(problem)),
                "repeats": problem.repeats if calls is None else calls,
            }
            for problem in wanted
        ]
        file = self._folder / "result"
        arguments = ["benchmarks.rivals.worker", str(file), rival.module, rival.way, json.dumps(tasks)]
        if rival == OURS:
            commands = ring_command(arguments, rival.ranks, cluster)
        else:
            commands = plain_commands(python_of(rival.environment), arguments, rival.ranks, cluster)
        try:
            return list(zip(*collect(commands, file, rival.ranks, TIMEOUT, cluster))), ""
        except FailedError as error:
            return list(zip(*error.done)), str(error)

    def _reference(self, problem: Problem) -> Path:
        folder = self._folder / problem.kind().replace(", ", "-").replace(" ", "-")
        folder.mkdir(exist_ok=True)
        return folder


def _add(row: OperatorRow, ranks: Sequence[dict]) -> None:
    """Add the seconds of each call of the slowest rank, and the error, to a row."""
    row.seconds += [max(calls) for calls in zip(*(rank["seconds"] for rank in ranks))]
    row.error = max(row.error or 0.0, *(max(rank["errors"].values()) for rank in ranks))
    row.versions = ranks[0]["versions"]


def _too_large(rival: Rival, problem: Problem) -> str:
    """Reason why the scores of a rival do not fit in memory; empty where they do."""
    need, free = rival.memory(problem), _free_memory()
    return f"its scores need {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free" if need > 0.9 * free else ""


def _free_memory() -> float:
    """Bytes of memory that processes can still get."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("inf"))

"""The operator: attention over 2 ranks with a core each, over the loopback interface and over a throttled link."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby, product
from pathlib import Path
from statistics import median

from launch.virtual import Cluster, unavailable

from .environments import python_of
from .problem import Problem
from .results import OperatorRow, load, save
from .roster import FIRST, OURS, ROSTER, Rival
from .starting import FailedError, collect, plain_commands, ring_command

LOOPBACK = "loopback"
LINKS = (LOOPBACK, "1gbit")
FEW = ((4096, 8, 8, 64), (4096, 8, 2, 128), (8192, 8, 2, 128))  # tokens, heads, key/value heads, head dimension
NEAR = 1.5  # times the fastest: such rivals are timed in all rounds, the others once
FIRST_CALLS = 2  # timed calls in the first round
TIMEOUT = 300.0  # s of one run


def problems(whole: bool) -> Iterator[Problem]:
    """Problems to measure, those of one shape in a row: the shapes `FEW`, or all at each length if `whole` is set."""
    for tokens, (heads, kv_heads), dim in product((4096, 8192, 16384), ((8, 8), (8, 2)), (64, 128)):
        if whole or (tokens, heads, kv_heads, dim) in FEW:
            for gradient, causal in product((False, True), (False, True)):
                yield Problem(tokens, heads, kv_heads, dim, causal, gradient)


class Operator:
    """Measurement of rivals, in pieces of one shape over one link. A piece that is in the file is not measured again.

    Args:
        links: `LOOPBACK`, and rates of links of the virtual cluster in units of tc.
        rounds: Number of rounds in which the fastest rivals take turns.
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
        self._failures: dict[tuple, str] = {}  # by rival, link and kind of problem: they do not depend on the size

    def run(self, wanted: Sequence[Problem], minutes: float) -> list[OperatorRow]:
        """Measure problems. Begin no piece after `minutes`. Save the rows after each piece, and return all."""
        end = time.monotonic() + 60 * minutes
        rows: list[OperatorRow] = load(self._file)["rows"] if self._file.exists() else []
        for link, (_, shape) in product(self._links, [(k, list(g)) for k, g in groupby(wanted, lambda p: p.shape)]):
            left = [problem for problem in shape if not any(r.link == link and r.problem == problem for r in rows)]
            if not left or time.monotonic() > end:
                continue
            where = nullcontext() if link == LOOPBACK else Cluster(2, rate=link, cores=1)
            with where as cluster, tempfile.TemporaryDirectory() as folder:
                found = Piece(left, link, cluster, Path(folder), self._failures).run(self._rounds, self._keep)
            for row in found:
                print(row.line(), flush=True)
            rows += found
            save(self._file, rows)
        return rows


class Piece:
    """Problems of one shape over one link. All rivals take turns, each with one start for all problems.

    Args:
        problems: The problems.
        link: Name of the link.
        cluster: Virtual hosts; ``None`` for this machine itself.
        folder: Folder for references and results.
        failures: Reasons of earlier failures by rival, link and kind of problem.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        link: str,
        cluster: Cluster | None,
        folder: Path,
        failures: dict[tuple, str],
    ):
        self._problems = problems
        self._link = link
        self._cluster = cluster
        self._folder = folder
        self._failures = failures
        self._rows: dict[tuple[Problem, Rival], OperatorRow] = {}

    def run(self, rounds: int, keep: Callable[[Rival], bool]) -> list[OperatorRow]:
        """Rows of all rivals that `keep` names, in the order of the problems."""
        if self._cluster is not None or not keep(FIRST):
            self._attempt(FIRST, self._problems, 1, None)
            self._rows.clear()
        for turn in range(rounds):
            limits = {problem: NEAR * self._fastest(problem) for problem in self._problems}
            for rival in ROSTER:
                if keep(rival) and (self._cluster is None or rival.ranks > 1):
                    chosen = [one for one in self._problems if not turn or self._near(rival, one, limits[one])]
                    self._attempt(rival, chosen, turn, self._cluster)
        order = {problem: i for i, problem in enumerate(self._problems)}
        return [row for _, row in sorted(self._rows.items(), key=lambda item: order[item[0][0]])]

    def _fastest(self, problem: Problem) -> float:
        times = [median(row.seconds) for (own, _), row in self._rows.items() if own == problem and row.seconds]
        return min(times, default=0.0)

    def _near(self, rival: Rival, problem: Problem, limit: float) -> bool:
        row = self._rows.get((problem, rival))
        return row is not None and bool(row.seconds) and (rival is OURS or median(row.seconds) <= limit)

    def _attempt(self, rival: Rival, wanted: Sequence[Problem], turn: int, cluster: Cluster | None) -> None:
        """Measure problems with a rival. After a failure it is started again for the problems after that."""
        left = []
        for problem in wanted:
            if not rival.solves(problem):
                continue
            reason = self._failures.get((rival, self._link, problem.kind())) or _too_large(rival, problem)
            if reason:
                self._row(rival, problem).failed = reason
            else:
                left.append(problem)
        while left:
            done, reason = self._start(rival, left, turn, cluster)
            for problem, ranks in zip(left, done):
                _add(self._row(rival, problem), ranks)
            left = left[len(done) :]
            if left and reason:
                self._failures[rival, self._link, left[0].kind()] = reason
                self._row(rival, left[0]).failed = reason
                left = left[1:]

    def _row(self, rival: Rival, problem: Problem) -> OperatorRow:
        return self._rows.setdefault((problem, rival), OperatorRow(self._link, problem, rival.title, rival.way))

    def _start(
        self, rival: Rival, wanted: Sequence[Problem], turn: int, cluster: Cluster | None
    ) -> tuple[list[tuple[dict, ...]], str]:
        """Results of all ranks for the first problems, and the reason why the next one has none."""
        tasks = [
            {
                "problem": problem.as_dict(),
                "reference": str(self._reference(problem)),
                "repeats": problem.repeats if turn else FIRST_CALLS,
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

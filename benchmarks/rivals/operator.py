"""The operator: attention over 2 ranks with a core each, over the loopback interface and over a throttled link."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median

from launch.virtual import Cluster, unavailable

from .environments import python_of
from .problem import Problem
from .results import OperatorRow, save
from .roster import FIRST, OURS, ROSTER, Rival
from .starting import FailedError, collect, plain_commands, ring_command

LOOPBACK = "loopback"
LINKS = (LOOPBACK, "1gbit")
NEAR = 1.5  # times the fastest: such rivals are timed in all rounds, the others once
TIMEOUT = 600.0  # s of one run


def problems(whole: bool) -> Iterator[Problem]:
    """Problems to measure: all at 4K tokens, and a few longer ones, or all at each length if `whole` is set."""
    shapes = list(product(((8, 8), (8, 2)), (64, 128), (False, True), (False, True)))
    for tokens in (4096, 8192, 16384):
        for (heads, kv_heads), dim, causal, gradient in shapes:
            few = tokens == 4096 or (kv_heads == 2 and (dim == 128 if tokens == 8192 else dim == 64 and causal))
            if whole or few:
                yield Problem(tokens, heads, kv_heads, dim, causal, gradient)


class Operator:
    """Measurement of rivals on problems over links.

    Args:
        links: `LOOPBACK`, and rates of links of the virtual cluster in units of tc.
        rounds: Number of rounds.
        keep: Function that says which rivals to run.
    """

    def __init__(self, links: Sequence[str], rounds: int, keep: Callable[[Rival], bool]):
        self._links = links
        self._rounds = rounds
        self._keep = keep
        self._failures: dict[tuple, str] = {}  # by rival, link and kind of problem: they do not depend on the size

    def run(self, wanted: Sequence[Problem], file: Path) -> list[OperatorRow]:
        """Measure all problems over all links. Save the rows to `file` after each problem, and return them."""
        rows: list[OperatorRow] = []
        with ExitStack() as stack:
            clusters = self._clusters(stack)
            for problem in wanted:
                with tempfile.TemporaryDirectory() as folder:
                    for link, cluster in clusters.items():
                        found = self._turns(problem, link, cluster, Path(folder))
                        rows += found
                        for row in found:
                            print(row.line(), flush=True)
                save(file, rows)
        return rows

    def _clusters(self, stack: ExitStack) -> Mapping[str, Cluster | None]:
        """Virtual hosts for each link; ``None`` for this machine itself."""
        links = list(self._links)
        if (reason := unavailable()) and links != [LOOPBACK]:
            print(f"Only over {LOOPBACK}: {reason}", flush=True)
            links = [LOOPBACK]
        return {
            link: None if link == LOOPBACK else stack.enter_context(Cluster(2, rate=link, cores=1)) for link in links
        }

    def _turns(self, problem: Problem, link: str, cluster: Cluster | None, folder: Path) -> list[OperatorRow]:
        """Rows of all rivals for a problem. They take turns, so that other work on the machine affects all alike."""
        if not (folder / "out.npy").exists() and (cluster is not None or not self._keep(FIRST)):
            self._attempt(FIRST, problem, LOOPBACK, None, folder)
        times: dict[Rival, list[float]] = {}
        rows: dict[Rival, OperatorRow] = {}
        for turn in range(self._rounds):
            limit = NEAR * min((median(x) for x in times.values()), default=0.0)
            for rival in ROSTER:
                if not (rival.solves(problem) and self._keep(rival) and (cluster is None or rival.ranks > 1)):
                    continue
                if turn and (rival not in times or (median(times[rival]) > limit and rival is not OURS)):
                    continue
                found = self._attempt(rival, problem, link, cluster, folder)
                if isinstance(found, str):
                    rows.setdefault(rival, OperatorRow(link, problem, rival.title, rival.way, failed=found))
                    continue
                times.setdefault(rival, []).extend(found["seconds"])
                rows[rival] = OperatorRow(link, problem, rival.title, rival.way, times[rival], **found["checked"])
        return list(rows.values())

    def _attempt(self, rival: Rival, problem: Problem, link: str, cluster: Cluster | None, folder: Path) -> dict | str:
        """Result of one run of a rival, or the reason why there is none."""
        kind = (rival, link, problem.kind())
        if kind in self._failures:
            return self._failures[kind]
        need, free = rival.memory(problem), _free_memory()
        if need > 0.9 * free:
            return f"its scores need {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
        try:
            return run_rival(rival, problem, cluster, folder)
        except FailedError as error:
            self._failures[kind] = str(error)
            return str(error)


def run_rival(rival: Rival, problem: Problem, cluster: Cluster | None, folder: Path) -> dict:
    """Seconds of each call of the slowest rank, errors and versions of one run.

    Raises:
        FailedError: The rival did not do it.
    """
    file = folder / "result"
    described = json.dumps(problem.as_dict())
    arguments = ["benchmarks.rivals.worker", str(file), rival.module, rival.way, described, str(folder)]
    if rival == OURS:
        commands = ring_command(arguments, rival.ranks, cluster)
    else:
        commands = plain_commands(python_of(rival.environment), arguments, rival.ranks, cluster)
    try:
        ranks = collect(commands, file, rival.ranks, TIMEOUT, cluster)
    finally:
        for result in folder.glob("result.*"):
            result.unlink()
    seconds = [max(calls) for calls in zip(*(rank["seconds"] for rank in ranks))]
    error = max(max(rank["errors"].values()) for rank in ranks)
    return {"seconds": seconds, "checked": {"error": error, "versions": ranks[0]["versions"]}}


def _free_memory() -> float:
    """Bytes of memory that processes can still get."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("inf"))

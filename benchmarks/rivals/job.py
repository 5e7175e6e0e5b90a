"""The whole job: a language model reads a prompt and answers, on virtual hosts with a core each."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.virtual import Cluster, unavailable

from .environments import python_of
from .results import JobRow, load, save
from .starting import FailedError, collect, plain_commands, ring_command

RATES = ("1gbit", "10gbit", "40gbit")
TIMEOUT = 900.0  # s of one run
SMOLLM2, LARGER = "smollm2", "larger"
MLX, OURS = "mlx", "ringattn"


@dataclass(frozen=True)
class Way:
    """A way to run a model.

    Attributes:
        name: Its name in `lm.ways`.
        attention: Whose attention: mlx-lm's own (``"mlx"``) or ringattn's (``"ringattn"``).
        title: Name for people.
        ranks: Number of hosts.
        longest: Tokens of the longest prompt for which it is measured.
    """

    name: str
    attention: str
    title: str
    ranks: int
    longest: int = 1 << 20


RING = Way("ring", OURS, "ringattn", 2)
WAYS = (
    Way("one", MLX, "mlx-lm, one host", 1),
    Way("one", OURS, "mlx-lm, one host", 1),
    Way("tensor", MLX, "mlx-lm, tensor parallel", 2, longest=8192),
    Way("tensor", OURS, "mlx-lm, tensor parallel", 2),
    Way("pipeline", MLX, "mlx-lm --pipeline", 2, longest=8192),
    Way("pipeline", OURS, "mlx-lm --pipeline", 2),
    Way("pipelined", OURS, "pipelined prefill", 2),
    RING,
)


@dataclass(frozen=True)
class Piece:
    """Ways that are measured one after another: those with one attention, and ringattn beside them."""

    rate: str
    model: str
    prompt: int
    attention: str

    def ways(self) -> list[Way]:
        """The ways, one host first."""
        return [way for way in WAYS if way is RING or (way.attention == self.attention and self.prompt <= way.longest)]


def pieces(whole: bool) -> Iterator[Piece]:
    """All pieces: each attention at the first rate, and at the others ringattn's for shorter prompts."""
    for rate in RATES:
        first = whole or rate == RATES[0]
        for attention in (OURS, MLX) if first else (OURS,):
            for prompt in (16384, 8192, 2048):
                if first or prompt <= 8192:
                    yield Piece(rate, LARGER, prompt, attention)
            yield Piece(rate, SMOLLM2, 2048, attention)


class Job:
    """Measurement of ways, in pieces. Samples that are in the file are not measured again.

    Args:
        samples: Number of measurements of each piece.
        keep: Function that says which ways to run.
        file: File for the results.
    """

    def __init__(self, samples: int, keep: Callable[[Way], bool], file: Path):
        if reason := unavailable():
            raise SystemExit(f"job: {reason}")
        self._samples = samples
        self._keep = keep
        self._file = file
        self._rows: dict[tuple, JobRow] = {}
        if file.exists():
            self._rows = {row.key: row for row in load(file)["rows"]}

    def run(self, wanted: Sequence[Piece], minutes: float) -> list[JobRow]:
        """Measure pieces. Begin none after `minutes`. Save the rows after each piece, and return all."""
        end = time.monotonic() + 60 * minutes
        for sample in range(self._samples):
            for piece in wanted:
                ways = [way for way in piece.ways() if self._keep(way)]
                if not ways or self._has(piece, ways[0], sample) or time.monotonic() > end:
                    continue
                with Cluster(2, rate=piece.rate, cores=1) as cluster, tempfile.TemporaryDirectory() as folder:
                    for way in ways:
                        row = self._row(piece, way)
                        self._measure(row, piece, way, cluster, Path(folder))
                        print(row.line(), flush=True)
                save(self._file, list(self._rows.values()))
        return list(self._rows.values())

    def _row(self, piece: Piece, way: Way) -> JobRow:
        row = JobRow(piece.rate, piece.model, way.title, way.attention, piece.prompt)
        return self._rows.setdefault(row.key, row)

    def _has(self, piece: Piece, first: Way, sample: int) -> bool:
        row = self._rows.get(JobRow(piece.rate, piece.model, first.title, first.attention, piece.prompt).key)
        return row is not None and (bool(row.failed) or len(row.first) > sample)

    def _measure(self, row: JobRow, piece: Piece, way: Way, cluster: Cluster, folder: Path) -> None:
        """Add a sample to a row, or the reason of a failure."""
        file = folder / "result"
        references = self._file.with_suffix(".answers")
        references.mkdir(parents=True, exist_ok=True)
        arguments = ["benchmarks.rivals.lm.worker", str(file), piece.model, way.name, way.attention]
        arguments += [str(piece.prompt), str(references)]
        try:
            ranks = collect(_commands(way, arguments, cluster, folder), file, way.ranks, TIMEOUT, cluster)
        except FailedError as error:
            row.failed = str(error)
            return
        figures = [rank[0] for rank in ranks]
        row.first.append(max(one["first"] for one in figures))
        row.token.append(max(one["token"] for one in figures))
        row.memory = max(one["memory"] for one in figures)
        row.sent = sum(one["sent"] for one in figures) if way.ranks > 1 else 0.0
        row.error = max(one["error"] for one in figures if "error" in one)


def _commands(way: Way, arguments: Sequence[str], cluster: Cluster, folder: Path) -> list:
    if way is RING:
        return ring_command(arguments, way.ranks, cluster)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"{address}:{31000 + i}"] for i, address in enumerate(cluster.addresses)]))
    return plain_commands(python_of(""), arguments, way.ranks, cluster, {"MLX_HOSTFILE": str(hosts)})

"""The whole job: a language model reads a prompt and answers, on virtual hosts with a core each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.virtual import Cluster, unavailable

from .environments import python_of
from .results import JobRow, save
from .starting import FailedError, collect, plain_commands, ring_command

RATES = ("1gbit", "10gbit", "40gbit")
TIMEOUT = 1800.0  # s of one run
SMOLLM2, LARGER = "smollm2", "larger"


@dataclass(frozen=True)
class Way:
    """A way to run a model.

    Attributes:
        name: Its name in `lm.ways`.
        attention: Whose attention: mlx-lm's own (``"mlx"``) or ringattn's (``"ringattn"``).
        title: Name for people.
        ranks: Number of hosts.
    """

    name: str
    attention: str
    title: str
    ranks: int


WAYS = (
    Way("one", "mlx", "mlx-lm, one host", 1),  # its answer is the reference
    Way("one", "ringattn", "mlx-lm, one host", 1),
    Way("tensor", "mlx", "mlx-lm, tensor parallel", 2),
    Way("tensor", "ringattn", "mlx-lm, tensor parallel", 2),
    Way("pipeline", "mlx", "mlx-lm --pipeline", 2),
    Way("pipeline", "ringattn", "mlx-lm --pipeline", 2),
    Way("pipelined", "ringattn", "pipelined prefill", 2),
    Way("ring", "ringattn", "ringattn", 2),
)


def runs(whole: bool) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Rate, model and lengths of prompts of each run. One host is measured at the first rate alone."""
    for rate in RATES:
        lengths = (2048, 8192, 16384) if whole or rate == RATES[0] else (2048, 8192)
        yield rate, LARGER, lengths
        if whole or rate == RATES[0]:
            yield rate, SMOLLM2, (2048, 8192) if whole else (2048,)


def run(plan: Sequence[tuple[str, str, Sequence[int]]], keep: Callable[[Way], bool], file: Path) -> list[JobRow]:
    """Measure all ways that `keep` names. Save the rows to `file` after each run, and return them."""
    if reason := unavailable():
        raise SystemExit(f"job: {reason}")
    rows: list[JobRow] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate, model, prompts in plan:
            with Cluster(2, rate=rate, cores=1) as cluster:
                for way in WAYS:
                    if not keep(way) or (way.ranks == 1 and rate != plan[0][0]):
                        continue
                    found = _rows(way, rate, model, prompts, cluster, Path(folder))
                    for row in found:
                        print(row.line(), flush=True)
                    rows += found
                    save(file, rows)
    return rows


def _rows(way: Way, rate: str, model: str, prompts: Sequence[int], cluster: Cluster, folder: Path) -> list[JobRow]:
    rows = [JobRow(rate if way.ranks > 1 else "none", model, way.title, way.attention, prompt) for prompt in prompts]
    lengths = ",".join(map(str, prompts))
    file = folder / "result"
    arguments = [
        "benchmarks.rivals.lm.worker", str(file), model, way.name, way.attention, lengths, str(folder)
    ]  # fmt: skip
    try:
        ranks = collect(_commands(way, arguments, cluster, folder), file, way.ranks, TIMEOUT, cluster)
    except FailedError as error:
        for row in rows:
            row.failed = str(error)
        return rows
    finally:
        for result in folder.glob("result.*"):
            result.unlink()
    for row in rows:
        figures = [rank[str(row.prompt)] for rank in ranks]
        row.first, row.token, row.memory = (max(one[name] for one in figures) for name in ("first", "token", "memory"))
        row.sent = sum(one["sent"] for one in figures) if way.ranks > 1 else 0.0
        row.error = max(one["error"] for one in figures if "error" in one)
    return rows


def _commands(way: Way, arguments: Sequence[str], cluster: Cluster, folder: Path) -> list:
    if way.name == "ring":
        return ring_command(arguments, way.ranks, cluster)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"{address}:{31000 + i}"] for i, address in enumerate(cluster.addresses)]))
    return plain_commands(python_of(""), arguments, way.ranks, cluster, {"MLX_HOSTFILE": str(hosts)})

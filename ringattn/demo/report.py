"""The table that ``ringattn demo`` prints, and whether its check passed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..layout import Layout
from ..mask import Band
from ..schedule import minimum
from .check import BUDGET
from .job import Figures
from .runs import Run

_COLUMNS = ("", "tokens", "time", "of it attention", "bytes sent", "peak memory growth", "largest error")


def report(ring: Run, alone: Run) -> str:
    """The demo's result for people: what was done, one table, what the figures mean, and where they were taken."""
    return "\n".join(["", headline(ring), "", *table(ring, alone), "", *explanation(ring, alone), "", machine(ring)])


def passed(ring: Run, alone: Run) -> bool:
    """Whether every checked row, of the ring and of the single process, is within the error budget."""
    return bool(all(one.error <= BUDGET for one in (*ring.figures, *alone.figures)))  # a NaN is not


def headline(run: Run) -> str:
    """One line that says what ran."""
    job = run.job
    return (
        f"SmolLM2-135M, first {job.layers} layers, {job.tokens:,} tokens of English text, causal, float32; "
        f"{job.ranks} ranks, zigzag, {job.strategy}"
    )


def minimum_bytes(run: Run) -> int:
    """The fewest bytes any exchange of keys could move: each key and value once to each other rank that sees it."""
    layout = Layout.zigzag(run.job.tokens, run.job.ranks)
    return run.job.layers * minimum(layout, layout, Band.of(True, None)) * run.figures[0].key_bytes


def table(ring: Run, alone: Run) -> list[str]:
    """One row for each rank, then all of them, the fewest bytes possible, and the single process."""
    ranks, size = ring.figures, ring.job.ranks
    rows = [_COLUMNS, *(_row(f"rank {one.rank}", one) for one in ranks)]
    rows.append(
        (
            f"{size} ranks",
            f"{sum(one.tokens for one in ranks):,}",
            f"{max(one.seconds for one in ranks):.2f} s",
            f"{max(one.attention_seconds for one in ranks):.2f} s",
            _bytes(sum(one.sent for one in ranks)),
            f"{_bytes(max(one.memory for one in ranks))} each",
            f"{np.max([one.error for one in ranks]):.1e}",
        )
    )
    rows.append(("fewest possible", "", "", "", _bytes(minimum_bytes(ring)), "", f"{BUDGET:.1e} allowed"))
    rows.append(_row("1 process", alone.figures[0]))
    lines = _aligned(rows)
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1 : size + 1], rule, *lines[size + 1 :]]


def explanation(ring: Run, alone: Run) -> list[str]:
    """What the table's last columns mean, and the verdict."""
    most, whole = max(one.memory for one in ring.figures), alone.figures[0].memory
    checked = f"{ring.job.samples} rows of every rank and layer, all heads"
    difference = np.abs(ring.hidden - alone.hidden).max() / np.abs(alone.hidden).max()
    memory = f"Memory: a rank's peak grew by {most / whole:.0%} of what one process needed for the whole sequence"
    return [
        f"{memory} (an equal share would be {1 / ring.job.ranks:.0%}).",
        f"Error: |attention - float64 softmax over all keys| / largest |value|, on {checked}.",
        f"Hidden states of all tokens after the last layer, against one process: {difference:.1e} of the largest.",
        f"Check {'passed' if passed(ring, alone) else 'FAILED'}.",
    ]


def machine(run: Run) -> str:
    """One line that says what this ran on, and what it therefore does not show."""
    cores = os.cpu_count()
    return (
        f"Run on {platform.system()} {platform.machine()}, {_processor()}, {cores} cores, mlx {version('mlx')}. "
        f"The {run.job.ranks} processes share one host's cores: this shows that the answer is right and what memory "
        "it takes, not a speed-up."
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _row(name: str, one: Figures) -> tuple[str, ...]:
    return (
        name,
        f"{one.tokens:,}",
        f"{one.seconds:.2f} s",
        f"{one.attention_seconds:.2f} s",
        _bytes(one.sent),
        _bytes(one.memory),
        f"{one.error:.1e}",
    )


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

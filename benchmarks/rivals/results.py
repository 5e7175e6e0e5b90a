"""Rows of results, and the JSON files that hold them."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ringattn.reporting.machine import machine

from .problem import Problem

FOLDER = Path(__file__).parent / "results"


@dataclass
class OperatorRow:
    """Result of one way of a library on one problem.

    Attributes:
        link: ``"loopback"`` or the rate of the link.
        problem: The problem.
        rival: Name of the library.
        way: Name of its way.
        seconds: Of each call, until the last rank was done.
        error: Largest difference from the reference, of the largest value.
        versions: Versions of its libraries.
        failed: Reason why there are no times.
    """

    link: str
    problem: Problem
    rival: str
    way: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    failed: str = ""

    @property
    def key(self) -> tuple:
        """What tells a row from all others."""
        return self.link, self.problem, self.rival, self.way

    @property
    def measured(self) -> bool:
        """Whether there are times, or a reason why there are none."""
        return bool(self.seconds or self.failed)

    def line(self) -> str:
        """One line for people."""
        what = "gradient" if self.problem.gradient else "forward"
        result = self.failed or f"{median(self.seconds):8.3f} s  error {self.error:.0e}"
        return f"{self.link:9} {self.problem.label():26} {what:9} {self.rival} ({self.way}): {result}"


@dataclass
class JobRow:
    """Result of one way to run a language model on one or two hosts.

    Attributes:
        rate: Rate of the hosts' links.
        model: Name of the model.
        way: Name of the way.
        attention: Whose attention it uses: ``"mlx"`` or ``"ringattn"``.
        prompt: Tokens of the prompt.
        first: Seconds to the first token, of each sample.
        token: Seconds for each further token, the median of each sample.
        memory: Largest peak of a host in bytes.
        sent: Bytes that all hosts sent from the prompt to the first token.
        error: Largest difference of the first token's log-probabilities from the reference, of the largest value.
        failed: Reason why there are no figures.
    """

    rate: str
    model: str
    way: str
    attention: str
    prompt: int
    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    memory: float | None = None
    sent: float | None = None
    error: float | None = None
    failed: str = ""

    @property
    def key(self) -> tuple:
        """What tells a row from all others."""
        return self.rate, self.model, self.way, self.attention, self.prompt

    def line(self) -> str:
        """One line for people, with the last sample."""
        found = self.failed
        if not found:
            assert self.first and self.token and self.memory is not None and self.sent is not None
            found = (
                f"first token {self.first[-1]:7.2f} s  token {self.token[-1] * 1e3:6.1f} ms  "
                f"{self.memory / 1e6:5.0f} MB  sent {self.sent / 1e6:6.1f} MB  error {self.error:.0e}"
            )
        return f"{self.rate:7} {self.model:10} {self.prompt:6} {self.way} ({self.attention}): {found}"


def save(file: Path, rows: Sequence[OperatorRow | JobRow]) -> None:
    """Write rows with the machine, the command and the time."""
    about = {"machine": machine(), "processor": processor(), "command": command(), "time": time.strftime("%F %R")}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def load(file: Path) -> dict[str, Any]:
    """What `save` wrote, with rows as objects."""
    found = json.loads(file.read_text())
    rows = found["rows"]
    if rows and "problem" in rows[0]:
        found["rows"] = [OperatorRow(**{**row, "problem": Problem(**row["problem"])}) for row in rows]
    else:
        found["rows"] = [JobRow(**row) for row in rows]
    return found


def command() -> str:
    """Command of this process, without the names of files and the time at which to stop."""
    line = " ".join(sys.argv[1:])
    return "python -m benchmarks.rivals " + re.sub(r" --(json|minutes)[ =]\S+", "", line)


def processor() -> str:
    """Name of the processor and number of its cores."""
    import os

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    return f"{os.cpu_count()} cores of {name} {vectors}".strip()

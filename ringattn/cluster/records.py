"""What the ranks' wrappers wrote down, read from the launcher's side."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from .rank import signal_group, start_time


@dataclass(frozen=True)
class Process:
    """A process that no other can be mistaken for: a pid may be given out again, but not with the same start time."""

    pid: int
    started: str

    @classmethod
    def parse(cls, line: str) -> Process:
        pid, _, started = line.partition(" ")
        return cls(int(pid), started)

    @property
    def alive(self) -> bool:
        """Whether it still runs or is stopped; a zombie is dead."""
        return bool(self.started) and start_time(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Signal it and the group that it leads."""
        if self.alive:
            signal_group(self.pid, number)

    def kill_group(self) -> None:
        """Kill it, and what it has started and left behind in its group."""
        if start_time(self.pid) in (None, self.started):  # a group keeps its dead leader's pid from being given out
            signal_group(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class End:
    """How a rank's program ended.

    Attributes:
        code: The exit code; negative for a signal.
        time: When, in seconds of ``time.monotonic()``.
        asked: Whether a signal from MPI or the launcher asked for it, so that it is not the cause of anything.
        line: One line for people.
    """

    code: int
    time: float
    asked: bool
    line: str

    @property
    def status(self) -> int:
        """The exit code as a shell would give it."""
        return self.code if self.code >= 0 else 128 - self.code


@dataclass
class Rank:
    """One rank as far as it is known."""

    number: str
    wrapper: Process
    child: Process
    end: End | None = None
    stopped: bool = False
    missing_since: float | None = None  # when its wrapper was first seen dead, without a record

    def __str__(self) -> str:
        return f"{self.number} (stopped)" if self.stopped else self.number


def read_records(directory: Path, ranks: dict[str, Rank]) -> None:
    """Bring `ranks` up to date with the records in `directory` (`rank` says what they are)."""
    names = set(os.listdir(directory))
    for name in names:
        number, _, kind = name.rpartition(".")
        if kind == "started" and number not in ranks:
            wrapper, child = (directory / name).read_text().splitlines()
            ranks[number] = Rank(number, Process.parse(wrapper), Process.parse(child))
    for number, rank in ranks.items():
        rank.stopped = f"{number}.stopped" in names
        if rank.end is None and f"{number}.ended" in names:
            rank.end = _read_end(directory / f"{number}.ended")
            rank.stopped = False


def _read_end(path: Path) -> End:
    numbers, line = path.read_text().splitlines()
    code, when, asked = numbers.split()
    return End(int(code), float(when), asked == "1", line)

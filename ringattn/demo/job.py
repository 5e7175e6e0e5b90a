"""What the parent tells its workers and what they answer, as JSON files in a folder that all of them see."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..transport.base import Event


@dataclass(frozen=True)
class Job:
    """One run of the demo.

    Attributes:
        model: What `ringattn.lm.load` takes.
        ranks: Number of processes; 0 for one process with mlx-lm alone.
        chunk: Tokens a rank computes in one round of prefill; ``None`` for the default.
        most: Tokens of the answer at most.
        document: The text.
    """

    model: str
    ranks: int
    chunk: int | None
    most: int
    document: str

    @property
    def plain(self) -> bool:
        """Whether mlx-lm does it alone."""
        return self.ranks == 0

    def write(self, folder: Path) -> None:
        """Put this job into `folder`."""
        (folder / "job.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job of `folder`."""
        return cls(**json.loads((folder / "job.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Figures:
    """What one rank saw.

    Attributes:
        rank: Which rank.
        prompt: Tokens of the prompt.
        tokens: The ids of the answer.
        text: The answer.
        held: Tokens whose keys and values this rank holds in the end.
        cache: Bytes of its keys and values, all layers.
        sent: Bytes of blocks and states sent to other ranks.
        reading: Tokens of the prompt per second.
        writing: Tokens of the answer per second.
        events: What the ring did in the last whole round of prefill.
    """

    rank: int
    prompt: int
    tokens: list[int]
    text: str
    held: int
    cache: int
    sent: int
    reading: float
    writing: float
    events: list[Event]

    def write(self, folder: Path) -> None:
        """Put these figures into `folder`."""
        (folder / f"figures-{self.rank}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, rank: int) -> Figures:
        """The figures of `rank`."""
        raw: dict[str, Any] = json.loads((folder / f"figures-{rank}.json").read_text(encoding="utf-8"))
        return cls(**{**raw, "events": [Event(*event) for event in raw["events"]]})


class Progress:
    """How far a worker is in its prompt: a file that rank 0 writes and the parent reads."""

    def __init__(self, folder: Path):
        self._path = folder / "progress"

    def reach(self, done: int, total: int) -> None:
        """Say that `done` of `total` tokens are read."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{done} {total}")
        new.replace(self._path)  # in one step: the parent reads at any time

    def share(self) -> float:
        """The part of the prompt that is read, 0 to 1."""
        if not self._path.exists():
            return 0.0
        done, total = map(int, self._path.read_text().split())
        return done / total

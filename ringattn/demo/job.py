"""What the parent tells its workers and what they answer, as JSON files in a folder that all of them see."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..comm.base import Event


@dataclass(frozen=True)
class Job:
    """One run of the demo.

    Attributes:
        model: Path of the GGUF file.
        ranks: Number of processes.
        tokens: Length of the whole sequence.
        layers: How many of the model's first layers to run.
        strategy: What travels around the ring; see `ringattn.ring_attention`.
        samples: Rows per rank and layer to check against float64.
    """

    model: str
    ranks: int
    tokens: int
    layers: int
    strategy: str
    samples: int = 16

    @property
    def layer_steps(self) -> int:
        """Steps of progress in one layer: the hops of its attention, and the rest."""
        return self.ranks + 1

    def write(self, folder: Path, tokens: np.ndarray) -> None:
        """Put this job and the ids of its tokens into `folder`."""
        np.save(folder / "tokens.npy", tokens)
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> tuple[Job, np.ndarray]:
        """The job and its tokens."""
        return cls(**json.loads((folder / "job.json").read_text())), np.load(folder / "tokens.npy")


@dataclass(frozen=True)
class Timeline:
    """The attention of one layer on one rank.

    Attributes:
        start: When it began, in seconds of ``time.time()``; `stop` likewise.
        stop: When the output was there.
        events: What happened in between.
    """

    start: float
    stop: float
    events: list[Event]

    @classmethod
    def parse(cls, start: float, stop: float, events: list[list[Any]]) -> Timeline:
        """From JSON, which has turned the events into plain lists."""
        return cls(start, stop, [Event(*event) for event in events])


@dataclass(frozen=True)
class Figures:
    """What one rank measured.

    Attributes:
        rank: Which rank.
        tokens: How many tokens it holds.
        seconds: Time of all layers, without loading and checking.
        sent: Bytes of blocks and states sent to other ranks.
        key_bytes: Bytes of one token's key and value, all heads of one layer.
        memory: Growth of the process's peak memory in bytes, from just before the first q, k and v on.
        error: Largest error of the sampled rows against float64, relative to the largest value of its layer.
        timelines: One for each layer.
    """

    rank: int
    tokens: int
    seconds: float
    sent: int
    key_bytes: int
    memory: int
    error: float
    timelines: list[Timeline]

    @property
    def attention_seconds(self) -> float:
        """Time of the attention of all layers."""
        return sum(one.stop - one.start for one in self.timelines)

    def write(self, folder: Path) -> None:
        """Put these figures into `folder`."""
        (folder / f"figures-{self.rank}.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path, rank: int) -> Figures:
        """The figures of `rank`."""
        raw: dict[str, Any] = json.loads((folder / f"figures-{rank}.json").read_text())
        return cls(**{**raw, "timelines": [Timeline.parse(**one) for one in raw["timelines"]]})


class Progress:
    """How far a rank is: a file as many bytes long as steps are done."""

    def __init__(self, folder: Path, rank: int):
        self._path = folder / f"progress-{rank}"

    def reach(self, step: int) -> None:
        """Say that `step` steps are done."""
        self._path.write_bytes(b"." * step)

    def done(self) -> int:
        """The number of steps done."""
        return self._path.stat().st_size if self._path.exists() else 0

"""Files through which the demo's command and its workers exchange the task, the progress and the results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODEL = "smollm2"
MODEL_TITLES = {MODEL: "SmolLM2-135M"}


@dataclass(frozen=True)
class ReadingTask:
    """Task of the demo's workers: read a document and answer a question about it.

    Attributes:
        model: Model for `ringattn.lm.load`.
        ranks: Number of processes; 0 for one process with plain mlx-lm.
        chunk: Tokens that a rank computes in one round of prefill; ``None`` for the default.
        max_tokens: Largest number of tokens of the answer.
        document: Text of the document.
        tensor: Number of neighbours that share the weights.
    """

    model: str
    ranks: int
    chunk: int | None
    max_tokens: int
    document: str
    tensor: int = 1

    @property
    def plain(self) -> bool:
        """Whether one process with plain mlx-lm does the task."""
        return self.ranks == 0

    @property
    def ranks_title(self) -> str:
        """Number of ranks, and how many of them share the weights."""
        return f"{self.ranks} ranks" + (f" in rows of {self.tensor}" if self.tensor > 1 else "")

    @property
    def model_title(self) -> str:
        """Name of the model for people."""
        return MODEL_TITLES.get(self.model, self.model)

    def write(self, folder: Path) -> None:
        """Write this task into `folder`."""
        (folder / "task.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ReadingTask:
        """Read the task in `folder`."""
        return cls(**json.loads((folder / "task.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class RankResult:
    """Answer and figures of one rank.

    Attributes:
        rank: Number of the rank.
        prompt: Tokens of the prompt.
        tokens: Token ids of the answer.
        text: Text of the answer.
        held: Tokens whose keys and values this rank holds in the end.
        contents: The kinds of arrays in the caches.
        cache: Bytes of these arrays, all layers, with the earlier states of recurrent layers that are kept.
        sent: Bytes of blocks and states that it sent to other ranks.
        prompt_tps: Tokens of the prompt per second.
        generation_tps: Tokens of the answer per second.
    """

    rank: int
    prompt: int
    tokens: list[int]
    text: str
    held: int
    contents: str
    cache: int
    sent: int
    prompt_tps: float
    generation_tps: float

    def write(self, folder: Path) -> None:
        """Write this result into `folder`."""
        (folder / f"result-{self.rank}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankResult:
        """Read the result of `rank`."""
        raw: dict[str, Any] = json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8"))
        return cls(**raw)


class ProgressFile:
    """Progress of the workers in their prompt. Rank 0 writes it, and the command reads it."""

    def __init__(self, folder: Path):
        self._path = folder / "progress"

    def write(self, done: int, total: int) -> None:
        """Record that `done` of `total` tokens are read."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{done} {total}")
        new.replace(self._path)  # atomic, since the command may read at any time

    def share(self) -> float:
        """Part of the prompt that is read, 0 to 1."""
        if not self._path.exists():
            return 0.0
        done, total = map(int, self._path.read_text().split())
        return done / total

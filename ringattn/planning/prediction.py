"""Arrangements of machines, and what is predicted of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

TEXTS = {
    "ring": "ring of {ring}",
    "tensor": "tensor parallel, {tensor}",
    "grid": "grid of {ring} rows of {tensor}",
    "pipeline": "pipeline of {stages}",
    "rings": "{groups} rings of {ring}",
    "one": "one machine",
}


@dataclass(frozen=True)
class Arrangement:
    """How machines share a model's work.

    Attributes:
        ring: Ranks over which the context is spread; in rings of rings, ranks of one of them.
        tensor: Neighbours that share the weights.
        stages: Stages of layers.
        groups: Rings of a ring of rings.
    """

    ring: int = 1
    tensor: int = 1
    stages: int = 1
    groups: int = 1

    @property
    def kind(self) -> str:
        """A key of `TEXTS`."""
        if self.stages > 1:
            return "pipeline"
        if self.groups > 1:
            return "rings"
        if self.tensor > 1:
            return "grid" if self.ring > 1 else "tensor"
        return "ring" if self.ring > 1 else "one"

    @property
    def machines(self) -> int:
        """Number of machines."""
        return self.ring * self.tensor * self.stages * self.groups

    def __str__(self) -> str:
        return TEXTS[self.kind].format(**vars(self))

    @property
    def command(self) -> str | None:
        """Options of ``ringattn generate`` for this arrangement; ``None`` where ringattn does not run it."""
        if self.kind in ("pipeline", "rings"):
            return None
        tensor = f" --tensor {self.tensor}" if self.tensor > 1 else ""
        return f"-n {self.machines}{tensor}"


@dataclass(frozen=True)
class Prediction:
    """Predicted time and memory of an arrangement.

    Attributes:
        arrangement: The arrangement.
        memory: Bytes that the fullest rank needs.
        available: Bytes that this rank may use.
        longest: The longest context that fits, in tokens; 0 where the weights alone do not.
        first: Seconds to the first token.
        token: Seconds of each further token.
        hidden: Share of the transfers of prefill that computation hides.
        sent: Bytes that all ranks send for a token of the prompt.
        strategy: Strategy of ring attention in the last round of prefill.
        weights: Share of the context, or of the layers, of each rank or row.
    """

    arrangement: Arrangement
    memory: float
    available: float
    longest: int
    first: float
    token: float
    hidden: float
    sent: float
    strategy: str
    weights: tuple[float, ...]

    @property
    def fits(self) -> bool:
        """Whether the memory is enough on every rank."""
        return self.memory <= self.available

    def seconds(self, answer: int) -> float:
        """Seconds until the last of `answer` tokens."""
        return self.first + self.token * max(0, answer - 1)


@lru_cache(maxsize=64)
def divisors(n: int) -> tuple[int, ...]:
    """The divisors of `n`, the smallest first."""
    return tuple(d for d in range(1, n + 1) if n % d == 0)

"""Rivals of the operator: how each runs, and how much memory it needs."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem


@dataclass(frozen=True)
class Rival:
    """One way of one library.

    Attributes:
        title: Name of the library.
        module: Name of its file in `attend`.
        way: Its name for the way.
        environment: Name of the virtual environment; empty for this process's own.
        ranks: Number of processes, with as many threads as cores for one process, one thread for more.
        square: Fraction of the whole matrix of scores of all heads that each rank holds.
        copies: Number of such matrices that it holds at once, without the gradient.
        causal: Whether the way exists for a causal mask alone.
        fast: Whether it may be the fastest of a problem. These take turns, and are called more often.
    """

    title: str
    module: str
    way: str
    environment: str
    ranks: int
    square: float = 0.0
    copies: int = 4
    causal: bool = False
    fast: bool = False

    @property
    def name(self) -> str:
        """Name in results."""
        return f"{self.module}:{self.way}"

    def solves(self, problem: Problem) -> bool:
        """Whether this way is meant for the problem: grouped heads expanded only where there are some."""
        if self.way == "expanded" and problem.heads == problem.kv_heads:
            return False
        return problem.causal or not self.causal

    def memory(self, problem: Problem) -> float:
        """Bytes of the score matrices of all ranks together."""
        copies = self.copies * (1.5 if problem.gradient else 1)
        return self.ranks * copies * self.square * 4.0 * problem.heads * problem.tokens**2


TORCH = "torch"
FIRST = Rival("PyTorch, one process", "pytorch", "grouped", TORCH, 1, fast=True)
OURS = Rival("ringattn", "ours", "ring", "", 2, fast=True)
ROSTER = (
    FIRST,  # its answer is the reference
    Rival("PyTorch, one process", "pytorch", "expanded", TORCH, 1, fast=True),
    OURS,
    Rival("axolotl-ringmaster", "ringmaster", "ulysses", TORCH, 2, fast=True),
    Rival("ringattn, one process", "ours", "alone", "", 1, fast=True),
    Rival("axolotl-ringmaster", "ringmaster", "gathered", TORCH, 2),
    Rival("axolotl-ringmaster", "ringmaster", "head-tail", TORCH, 2, causal=True),
    Rival("PyTorch context_parallel", "pytorch_context_parallel", "flex", TORCH, 2),
    Rival("PyTorch context_parallel", "pytorch_context_parallel", "sdpa", TORCH, 2, square=0.5),
    Rival("ring-attention-pytorch", "ring_attention_pytorch", "contiguous", TORCH, 2),
    Rival("ring-attention-pytorch", "ring_attention_pytorch", "striped", TORCH, 2, causal=True),
    Rival("MLX, one process", "mlx", "own", "", 1, square=1.0, copies=3),
    Rival("axolotl-ringmaster", "ringmaster", "distflash", TORCH, 2, square=0.25, causal=True),
    Rival("axolotl-ringmaster", "ringmaster", "ring", TORCH, 2, square=0.25),
)

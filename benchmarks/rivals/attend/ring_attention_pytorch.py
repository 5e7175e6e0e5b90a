"""ring-attention-pytorch over gloo: its path for CPUs, in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

from ..problem import Problem, contiguous
from . import Work, torch_ranks
from .pytorch import versions

__all__ = ["prepare", "versions"]

BUCKET = 1024  # tokens of a tile, its default


def prepare(problem: Problem, way: str, rank: int, size: int) -> Work:
    """Attend with each rank's tokens in one piece (`way` ``"contiguous"``) or dealt out one by one (``"striped"``)."""
    barrier = torch_ranks.join(size)
    positions = contiguous(problem.tokens, rank, size)
    if way == "striped":
        buckets = problem.tokens // BUCKET
        own = np.arange(buckets * rank // size, buckets * (rank + 1) // size)
        positions = (np.arange(BUCKET)[None] * buckets + own[:, None]).reshape(-1)
    arrays = torch_ranks.local_tensors(problem, positions)
    group = problem.heads // problem.kv_heads
    to_theirs = np.arange(problem.heads).reshape(-1, group).T.reshape(-1)  # query heads that share keys are apart there
    to_ours = np.argsort(to_theirs)
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in arrays)
    q, dout = (x[:, :, to_theirs].contiguous() for x in (q, dout))

    def attend(q, k, v):
        return ring_flash_attn(
            q,
            k,
            v,
            causal=problem.causal,
            bucket_size=BUCKET,
            ring_reduce_col=True,
            striped_ring_attn=way == "striped",
            ring_size=size,
        )

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return x[:, to_ours] if x.shape[1] == problem.heads else x

    return torch_ranks.work(problem, positions, [q, k, v, dout], attend, barrier, heads_first)

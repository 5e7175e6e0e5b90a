"""axolotl-ringmaster over gloo, through the attention functions that it registers with transformers."""

from __future__ import annotations

from types import SimpleNamespace

import ringmaster as rm
import torch
from transformers import AttentionInterface

from ..problem import Problem, contiguous
from . import Work, torch_ranks
from .pytorch import versions

__all__ = ["prepare", "versions"]

RINGS = {  # way -> options of its configuration
    "gathered": {"rotate_method": rm.RotateMethod.ALLGATHER},
    "ring": {"rotate_method": rm.RotateMethod.ALLTOALL},
    "head-tail": {"load_balance": rm.LoadBalance.HEAD_TAIL},
    "distflash": {"load_balance": rm.LoadBalance.DISTFLASH},
}


def prepare(problem: Problem, way: str, rank: int, size: int) -> Work:
    """Attend by `way`: ``"ulysses"`` (heads exchanged for tokens, PyTorch's fused kernel) or one of `RINGS`."""
    barrier = torch_ranks.join(size)
    config = rm.RingmasterConfig(size=size, backend=rm.Backend.ULYSSES)
    if way != "ulysses":
        config = rm.RingmasterConfig(size=size, backend=rm.Backend.RING, **RINGS[way])
    runtime = rm.setup(config, num_kv_heads=problem.kv_heads, device_type="cpu", inner_attn="sdpa")
    function = AttentionInterface()[runtime.attn_implementation]
    module = torch.nn.Module()
    module.is_causal = problem.causal
    module.num_key_value_groups = problem.heads // problem.kv_heads
    module.config = SimpleNamespace(_attn_implementation=runtime.attn_implementation)
    positions = contiguous(problem.tokens, rank, size)
    arrays = torch_ranks.local_tensors(problem, positions)
    arrays[3] = arrays[3].transpose(1, 2).contiguous()
    scale = problem.dim**-0.5

    def attend(q, k, v):
        return function(module, q, k, v, None, scaling=scale, is_causal=problem.causal)[0]

    def heads_first(x: torch.Tensor) -> torch.Tensor:  # `out` has tokens before heads, the gradients have not
        return x.transpose(1, 2) if x.shape[1] == len(positions) else x

    work = torch_ranks.work(problem, positions, arrays, attend, barrier, heads_first)
    work.close = rm.teardown
    return work

"""One process of PyTorch: its fused attention for CPUs."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..problem import Problem, contiguous
from . import Work, torch_ranks


def prepare(problem: Problem, way: str, rank: int, size: int) -> Work:
    """Attend with grouped heads (`way` ``"grouped"``), or with keys and values repeated for each head (``"expanded"``).

    PyTorch is faster now with the one, now with the other. The repetition is not part of the time.
    """
    barrier = torch_ranks.join(size)
    positions = contiguous(problem.tokens, rank, size)
    q, k, v, dout = torch_ranks.local_tensors(problem, positions)
    group = problem.heads // problem.kv_heads
    if way == "expanded":
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    attend = partial(scaled_dot_product_attention, is_causal=problem.causal, enable_gqa=way == "grouped" and group > 1)
    result = torch_ranks.work(problem, positions, [q, k, v, dout], attend, barrier)
    if way == "grouped" or not problem.gradient:
        return result
    own = result.answer

    def answer() -> list:
        out, dq, *others = own()
        return [out, dq, *(x.reshape(-1, group, *x.shape[1:]).sum(1) for x in others)]

    result.answer = answer
    return result


def versions() -> dict[str, str]:
    """Versions of the libraries."""
    return {"torch": torch.__version__}

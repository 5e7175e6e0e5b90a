"""PyTorch's context parallelism over gloo: `context_parallel` for SDPA, or its path for FlexAttention."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import _attention as cp
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..problem import Problem, contiguous
from . import Work, torch_ranks
from .pytorch import versions

__all__ = ["prepare", "versions"]


def prepare(problem: Problem, way: str, rank: int, size: int) -> Work:
    """Attend by `way`: ``"sdpa"`` or ``"flex"``.

    PyTorch has no context-parallel kernel for CPUs. SDPA runs over the ranks with its unfused backend (MATH), and
    FlexAttention gathers all keys and values.
    """
    barrier = torch_ranks.join(size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    return (_sdpa if way == "sdpa" else _flex)(problem, mesh, rank, size, barrier)


def _sdpa(problem, mesh, rank, size, barrier) -> Work:
    positions = contiguous(problem.tokens, rank, size)
    if problem.causal:  # the default order of `context_parallel`: a piece from the front and one from the back
        positions = _head_tail(problem.tokens, rank, size)
    arrays = torch_ranks.local_tensors(problem, positions)
    patched = ExitStack()
    patched.enter_context(cp.context_parallel(mesh, buffers=[torch.zeros(1, 1, problem.tokens)], buffer_seq_dims=[2]))
    patched.enter_context(sdpa_kernel(SDPBackend.MATH))
    group = problem.heads // problem.kv_heads

    def attend(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=group > 1)

    work = torch_ranks.work(problem, positions, arrays, attend, barrier)
    work.close = patched.close
    return work


def _flex(problem, mesh, rank, size, barrier) -> Work:
    positions = contiguous(problem.tokens, rank, size)
    mask = None
    if problem.causal:
        balancer = cp._HeadTailLoadBalancer(problem.tokens, size, "cpu")
        positions = balancer._generate_indices()[0].numpy()[positions]
        whole = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, problem.tokens, problem.tokens, device="cpu")
        (mask,) = cp._context_parallel_shard(mesh, [whole], [2], load_balancer=balancer)
    module = _Flex(problem.heads != problem.kv_heads)
    plan = cp._ContextParallel(seq_dim=2, attention_type=cp._ContextParallel.AttentionType.FLEX)
    parallelize_module(module, mesh, plan)
    arrays = torch_ranks.local_tensors(problem, positions)

    def attend(q, k, v):
        return module(q, k, v, block_mask=mask)

    work = torch_ranks.work(problem, positions, arrays, attend, barrier)
    work.close = torch.compiler.reset  # each problem is compiled for its shape
    return work


class _Flex(torch.nn.Module):
    def __init__(self, grouped: bool):
        super().__init__()
        self.grouped = grouped
        self.attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(self, q, k, v, block_mask=None):
        return self.attend(q, k, v, block_mask=block_mask, enable_gqa=self.grouped)


def _head_tail(tokens: int, rank: int, size: int):
    return torch.cat([torch.arange(tokens).chunk(2 * size)[i] for i in (rank, 2 * size - 1 - rank)]).numpy()

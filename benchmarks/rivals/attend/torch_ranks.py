"""Functions that all rivals on PyTorch share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from ..problem import Problem
from . import Work


def join(size: int) -> Callable[[], None]:
    """Join the process group over gloo, if there is one. Return its barrier."""
    if size == 1:
        return lambda: None
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return lambda: dist.barrier()


def local_tensors(problem: Problem, positions: np.ndarray) -> list[torch.Tensor]:
    """q, k, v and the gradient of `out` at these positions, ``[1, heads, tokens, dim]``."""
    return [torch.from_numpy(np.ascontiguousarray(x[None, :, positions])) for x in problem.arrays()]


def work(
    problem: Problem,
    positions: np.ndarray,
    arrays: list[torch.Tensor],
    attend: Callable[..., torch.Tensor],
    barrier: Callable[[], None],
    to_heads_first: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Work:
    """Work that calls ``attend(q, k, v)``, where `arrays` are q, k, v and the gradient of `out`.

    `to_heads_first` brings a result into the order ``[1, heads, tokens, dim]``.
    """
    *leaves, dout = arrays

    def call() -> list[torch.Tensor]:
        if not problem.gradient:
            with torch.no_grad():
                return [attend(*leaves)]
        inputs = [x.detach().requires_grad_() for x in leaves]
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, dout)]

    def answer() -> list[np.ndarray]:
        return [to_heads_first(x.detach())[0].numpy() for x in call()]

    return Work(positions, call, answer, barrier)

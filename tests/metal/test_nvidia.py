"""Compilation of the Metal kernels, translated to CUDA. `tools.nvidia.check` runs them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

import ringattn as ra
from ringattn.metal import KernelCall, launch
from tools.nvidia.compiler import resources
from tools.nvidia.executor import translated
from tools.nvidia.kernels import zeros

pytestmark = [pytest.mark.cuda, pytest.mark.emulator]


def capture(monkeypatch: pytest.MonkeyPatch, attend: Callable[[], object]) -> list[KernelCall]:
    """Record the kernel calls that `attend` makes, with zeros for outputs."""
    calls: list[KernelCall] = []

    def executor(call: KernelCall) -> list[mx.array]:
        calls.append(call)
        return zeros(call)

    with monkeypatch.context() as patch:
        patch.setattr(launch.launcher, "executor", executor)
        mx.eval(attend())
    return calls


def gradient(dtype: mx.Dtype, dim: int, **options):
    return mx.grad(lambda q: attention(dtype, dim, q=q, return_lse=True, **options)[1].sum())(
        mx.ones((1, 4, 40, dim), dtype)
    )


def attention(dtype: mx.Dtype, dim: int, q_len: int = 40, k_len: int = 40, v_dim: int | None = None, **options):
    q = options.pop("q", mx.ones((1, 4, q_len, dim), dtype))
    k, v = (mx.ones((1, 2, k_len, d), dtype) for d in (dim, dim if v_dim is None else v_dim))
    return ra.attention(q, k, v, backend="metal", **options)


IDS = mx.zeros((1, 40), mx.int32)
VARIANTS: dict[str, Callable[[], object]] = {
    "float16, 64, every switch": lambda: attention(
        mx.float16,
        64,
        mask=mx.ones((40, 40), mx.bool_),
        window=9,
        softcap=5.0,
        segments=(IDS, IDS),
        sinks=mx.zeros(4),
        return_lse=True,
    ),
    "bfloat16, 128, additive mask": lambda: attention(mx.bfloat16, 128, mask=mx.zeros((40, 40), mx.bfloat16)),
    "float32, 256, causal": lambda: attention(mx.float32, 256, mask="causal", return_lse=True),
    "bfloat16, 256, plain": lambda: attention(mx.bfloat16, 256),
    "gradient, float32, every switch": lambda: gradient(
        mx.float32, 64, mask=mx.zeros((40, 40)), window=9, softcap=5.0, segments=(IDS, IDS)
    ),
    "gradient, bfloat16": lambda: gradient(mx.bfloat16, 128),
    "float16, 80 and 32, keys split": lambda: attention(
        mx.float16, 80, 1, 2048, 32, sinks=mx.zeros(4), mask="causal", return_lse=True
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kernel_compiles_as_cuda(monkeypatch, name: str) -> None:
    for call in capture(monkeypatch, VARIANTS[name]):
        assert not resources(translated(call), "sm_90a").remarks

"""The kernel that packs blocks for transfers between GPUs, executed on the CPU by `tools.hostcuda`."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from ringattn.cuda import KernelCall
from ringattn.native import cuda
from ringattn.native.cuda import Driver
from tools.hostcuda import Runtime, lacking

pytestmark = pytest.mark.skipif(lacking() is not None, reason=f"the host runtime for CUDA lacks {lacking()}")


@pytest.fixture(autouse=True)
def host(monkeypatch) -> Iterator[None]:
    """`mx.fast.cuda_kernel` on the CPU."""

    def cuda_kernel(ensure_row_contiguous: bool, **built):
        assert not ensure_row_contiguous

        def run(**more) -> list[mx.array]:
            call = KernelCall(**{**built, **more, "template": []}, shared_memory=0)
            return Runtime()(call)

        return run

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel, raising=False)
    yield
    cuda._pack_kernel.cache_clear()


def numbers(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(len(shape))) * 9).astype(dtype)


ARRAYS = {
    "keys": (numbers(2, 3, 37, 32), 2),
    "odd head_dim": (numbers(1, 4, 21, 33, dtype=mx.float16), 2),
    "float32": (numbers(1, 2, 40, 8, dtype=mx.float32), 2),
    "tokens first": (numbers(37, 2, 3, 16).transpose(1, 2, 0, 3), 2),
    "tokens before heads": (numbers(1, 30, 3, 16).transpose(0, 2, 1, 3), 2),
    "every other token": (numbers(1, 2, 60, 16)[:, :, ::2], 2),
    "from an odd address": (numbers(1, 2, 40, 17)[..., 1:], 2),
    "dims apart": (numbers(1, 2, 16, 25).transpose(0, 1, 3, 2), 2),
    "one head, shared": (mx.broadcast_to(numbers(1, 1, 30, 16), (1, 4, 30, 16)), 2),
    "rows": (numbers(2, 3, 50, dtype=mx.float32), 2),
    "ids": (mx.arange(80).reshape(2, 40).astype(mx.int32), 1),
    "a boolean mask": (numbers(1, 1, 20, 48, dtype=mx.float32) > 0, 2),
}


@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_packs(name: str, more: int) -> None:
    x, axis = ARRAYS[name]
    tokens = x.shape[axis]
    (packed,) = Driver.pack(None, [x], [axis], tokens + more)
    expected = mx.moveaxis(x, axis, 0)
    assert packed.shape == (tokens + more, *expected.shape[1:]) and packed.dtype == x.dtype
    assert mx.array_equal(packed[:tokens], expected)


def test_several_arrays_at_once() -> None:
    x, y = numbers(1, 2, 30, 16), numbers(1, 30, dtype=mx.float32)
    first, second = Driver.pack(None, [x, y], [2, 1], 30)
    assert mx.array_equal(first, mx.moveaxis(x, 2, 0)) and np.array_equal(second, mx.moveaxis(y, 1, 0))

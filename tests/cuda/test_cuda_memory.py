"""The kernels that find, make and fill memory on the GPU, executed on the CPU by `tools.hostcuda`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from ringattn.cuda import KernelCall
from ringattn.native import cuda, memory_kernels
from ringattn.native.cuda import Driver
from tools.hostcuda import Runtime, lacking

pytestmark = pytest.mark.skipif(lacking() is not None, reason=f"the host runtime for CUDA lacks {lacking()}")


@pytest.fixture(autouse=True)
def host(monkeypatch) -> Iterator[None]:
    """`mx.fast.cuda_kernel` on the CPU."""

    def cuda_kernel(ensure_row_contiguous: bool, **built):
        assert not ensure_row_contiguous

        def run(**more) -> list[mx.array]:
            more["output_shapes"] = [tuple(shape) for shape in more["output_shapes"]]
            call = KernelCall(**{"header": "", **built, **more, "template": []}, shared_memory=0)
            return Runtime()(call)

        return run

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel, raising=False)
    yield
    memory_kernels.pack_kernel.cache_clear()
    memory_kernels.addresses_kernel.cache_clear()


@pytest.fixture
def gpu() -> Driver:
    """The driver of a GPU whose memory is the host's."""
    made = Driver.__new__(Driver)
    made._boxes = memoryview(bytearray(8 * cuda.BOXES * cuda.BOX))
    made._next = 0
    return made


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
def test_packs(gpu: Driver, name: str, more: int) -> None:
    x, axis = ARRAYS[name]
    tokens = x.shape[axis]
    (packed,) = gpu.pack([x], [axis], tokens + more)
    expected = mx.moveaxis(x, axis, 0)
    assert packed.shape == (tokens + more, *expected.shape[1:]) and packed.dtype == x.dtype
    assert mx.array_equal(packed[:tokens], expected)


def test_names_have_the_dtypes_and_the_text(gpu: Driver, monkeypatch) -> None:
    """MLX keeps compiled kernels by their names alone, in the process and on disk."""
    names = []
    original = mx.fast.cuda_kernel
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **built: names.append(built["name"]) or original(**built))
    for dtype in (mx.float32, mx.bfloat16):
        gpu.pack([numbers(1, 2, 8, 8, dtype=dtype)] * 2, [2, 2], 8)
        gpu.locate([numbers(1, 2, 8, 8, dtype=dtype)])
    assert len(names) == len(set(names)) == 4
    memory_kernels.pack_kernel.cache_clear()
    changed = Path(memory_kernels.PACK).read_text() + "// changed"
    monkeypatch.setattr(memory_kernels, "PACK", SimpleNamespace(read_text=lambda: changed))
    gpu.pack([numbers(1, 2, 8, 8, dtype=mx.float32)] * 2, [2, 2], 8)
    assert len(set(names)) == 5


def test_several_arrays_at_once(gpu: Driver) -> None:
    x, y = numbers(1, 2, 30, 16), numbers(1, 30, dtype=mx.float32)
    first, second = gpu.pack([x, y], [2, 1], 30)
    assert mx.array_equal(first, mx.moveaxis(x, 2, 0)) and np.array_equal(second, mx.moveaxis(y, 1, 0))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_addresses(gpu: Driver, count: int) -> None:
    """More arrays than one kernel has places for, and more calls than there are boxes. (The runtime copies inputs.)"""
    for _ in range(cuda.BOXES // 2):
        arrays = [numbers(8 + i, 4, dtype=(mx.float32, mx.bfloat16)[i % 2]) for i in range(count)]
        lazy, places = gpu.locate([mx.zeros((0, 4)), *arrays])
        assert len(places()) == count + 1 and places()[0] == 0 and all(places()[1:])
        assert len(lazy) == -(-count // cuda.BOX)


def test_new_arrays(gpu: Driver) -> None:
    """Also some without an element."""
    kinds = [((3, 0) if i in (0, 5, 39) else (i, 2), (mx.float32, mx.int32)[i % 2]) for i in range(40)]
    arrays, places = gpu.allocate(kinds)
    arrays.append(mx.zeros(3))  # the list is the caller's own
    assert [(x.shape, x.dtype) for x in arrays[:-1]] == kinds
    assert len(places()) == 40 and places()[5] == places()[39] == 0
    assert all(places()[i] for i in range(40) if i not in (0, 5, 39))

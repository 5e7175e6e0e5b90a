"""Tests of the runtime itself: what a GPU would do wrong, it says."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from ringattn.cuda import KernelCall
from ringattn.cuda.source import TYPES, text
from tools.hostcuda import KernelError, Runtime, lacking
from tools.hostcuda.translate import translate

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(lacking() is not None, reason=f"the host runtime for CUDA lacks {lacking()}"),
]
MEMORY = "extern __shared__ __align__(16) unsigned char memory[]; float* s = reinterpret_cast<float*>(memory);\n"
TURNED = MEMORY + "const int t = threadIdx.x; s[t] = x[t]; %s y[t] = s[63 - t];"
COPIED = (
    MEMORY
    + 'asm volatile("cp.async.ca.shared.global [%%0], [%%1], 4;" :: "r"(__cvta_generic_to_shared(s + threadIdx.x)),'
    + ' "l"(x + threadIdx.x) : "memory"); asm volatile("cp.async.commit_group;"); %s __syncthreads();'
    + " y[threadIdx.x] = s[63 - threadIdx.x];"
)
WAIT = 'asm volatile("cp.async.wait_group 0;" ::: "memory");'


def call(source: str, x: mx.array, header: str = "", shape: tuple[int, ...] = (64,), threads: int = 64) -> KernelCall:
    return KernelCall(
        name="planted",
        input_names=["x"],
        output_names=["y"],
        source=source,
        header=header,
        inputs=[x],
        template=[],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[mx.float32],
        shared_memory=1 << 15,
    )


NUMBERS = mx.arange(64).astype(mx.float32)


def test_a_barrier_is_kept() -> None:
    for runtime in (Runtime(), Runtime(races=True)):
        (y,) = runtime(call(TURNED % "__syncthreads();", NUMBERS))
        assert mx.array_equal(y, NUMBERS[::-1])


def test_a_missing_barrier_is_a_race() -> None:
    with pytest.raises(KernelError, match="race"):
        Runtime(races=True)(call(TURNED % "", NUMBERS))


def test_a_barrier_that_some_threads_miss_is_told() -> None:
    with pytest.raises(KernelError, match="wait for ever"):
        Runtime()(call("if (threadIdx.x > 0) { __syncthreads(); } y[threadIdx.x] = 0;", NUMBERS))


def test_a_copy_that_nobody_waits_for_is_late() -> None:
    (y,) = Runtime(late=True)(call(COPIED % WAIT, NUMBERS))
    assert mx.array_equal(y, NUMBERS[::-1])
    (y,) = Runtime(late=True)(call(COPIED % "", NUMBERS))
    assert mx.isnan(y).all()


def test_an_address_that_is_not_aligned_is_told() -> None:
    with pytest.raises(KernelError, match="multiple"):
        Runtime()(call(COPIED.replace("s + threadIdx.x", "memory + 2") % WAIT, NUMBERS))


def test_an_instruction_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match="redux"):
        translate('asm("redux.sync.add.s32 %0, %1, 0xff;" : "=r"(x) : "r"(y));')


PRODUCT = """
  extern __shared__ __align__(1024) unsigned char memory[];
  RA_T* a = reinterpret_cast<RA_T*>(memory);
  RA_T* b = a + tile_size(64, 64);
  for (int i = threadIdx.x; i < 64 * 64; i += 128) {
    const int at = place<64, SWIZZLED>(i / 64, i %% 64);
    a[at] = x[i];
    b[at] = x[64 * 64 + i];
  }
  publish_to_products();
  __syncthreads();
  float s[8][4] = {};
  begin_products();
  for (int k = 0; k < 64; k += 16) {
    %s
  }
  commit_products();
  wait_for_products<0>();
  const int lane = threadIdx.x %% 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int e = 0; e < 32; e++) {
    y[(row + e %% 4 / 2 * 8) * 64 + e / 4 * 8 + lane %% 4 * 2 + e %% 2] = s[e / 4][e %% 4];
  }
"""
ROWS, COLUMNS = "describe(description_of({0}), k)", "describe(description_of({0}, 128 * 64), k * 64)"
PRODUCTS = {
    "a b^T": (False, False, "ij,kj->ik"),
    "a b": (False, True, "ij,jk->ik"),
    "a^T b": (True, True, "ji,jk->ik"),
    "a^T b^T": (True, False, "ji,kj->ik"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_warpgroup(name: str, dtype: mx.Dtype, late: bool) -> None:
    a_columns, b_columns, formula = PRODUCTS[name]
    arguments = [(COLUMNS if columns else ROWS).format(x) for columns, x in ((a_columns, "a"), (b_columns, "b"))]
    flags = f"{str(a_columns).lower()}, {str(b_columns).lower()}"
    source = PRODUCT % f"multiply_shared<{flags}>(s, {arguments[0]}, {arguments[1]}, k > 0);"
    defines = {"T": TYPES[dtype], "BFLOAT": int(dtype == mx.bfloat16), "MATRIX": 1, "BD": 64, "BV": 64, "WARPS": 4}
    header = "".join(f"#define RA_{key} {value}\n" for key, value in defines.items())
    header += "".join(text(f"{part}.cuh") for part in ("tiles", "softmax", "matrix", "hopper"))
    x = mx.array(np.random.default_rng(0).standard_normal((2, 64, 64)), mx.float32).astype(dtype)
    (y,) = Runtime(late=late)(call(source, x, header, (64, 64), 128))
    exact = np.einsum(formula, *np.array(x.astype(mx.float32), np.float64))
    assert np.abs(np.array(y) - exact).max() < 1e-4 * np.abs(exact).max()

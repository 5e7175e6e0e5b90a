"""The program that MLX's `mx.fast.cuda_kernel` compiles for a kernel call."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from ringattn.cuda import source
from ringattn.kernels.gpu.launch import KernelCall

TYPES = source.TYPES | {mx.uint32: "uint32_t", mx.uint64: "uint64_t"}
PER_ARRAY = {"shape": "Shape", "strides": "Strides", "ndim": "int"}  # that follow an input where the source names them
# Names of MLX's headers that kernels use. Its arrays are those of `cuda::std`, whose headers take longer than a kernel.
BEFORE = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uint64_t = unsigned long;
namespace mlx::core::cu {
template <typename T> struct Axes {
  T of[10];
  __device__ constexpr const T& operator[](int i) const { return of[i]; }
};
using Shape = Axes<int32_t>;
using Strides = Axes<int64_t>;
}
"""
PROGRAM = """{before}{header}
namespace mlx::core::cu {{
__global__ void custom_kernel_{name}({parameters}) {{
{constants}{source}
}}
}}
"""


def program(call: KernelCall) -> str:
    """Build the program of `call`."""
    return PROGRAM.format(
        before=BEFORE,
        header=call.header,
        name=call.name,
        parameters=", ".join(parameters(call)),
        constants="".join(f"{constant(*argument)};\n" for argument in call.template),
        source=call.source,
    )


def parameters(call: KernelCall) -> Iterator[str]:
    """Declare the buffers of a kernel, and of its inputs the shapes and strides that the source names."""
    for name, array in zip(call.input_names, call.inputs):
        yield f"const {TYPES[array.dtype]}* {name}"
        named = [suffix for suffix in PER_ARRAY if array.ndim > 0 and f"{name}_{suffix}" in call.source]
        yield from (f"const __grid_constant__ {PER_ARRAY[suffix]} {name}_{suffix}" for suffix in named)
    yield from (f"{TYPES[dtype]}* {name}" for name, dtype in zip(call.output_names, call.output_dtypes))


def constant(name: str, value: mx.Dtype | int | bool) -> str:
    """Declare a template argument."""
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]}"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"constexpr {kind} {name} = {int(value)}"

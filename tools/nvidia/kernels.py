"""Calls of the kernels for NVIDIA GPUs that GPUs of several architectures are given: together all variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from ringattn.core.kept import Kept
from ringattn.cuda import KernelCall, calls, device, dispatch, gradient_plans, launch
from ringattn.kernels.gpu.launch import KernelCall as AnyCall
from ringattn.native import memory_kernels

from .problems import Problem

# Compute capabilities by the name that MLX gives to the compiler; "a" is for instructions of this GPU alone, as wgmma.
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0), "sm_121a": (12, 1)}
KEPT = ((dispatch, "_kept"), (calls, "_prepared"), (gradient_plans, "_planned"))
EVERYTHING = {"high": 0, "softcap": 5.0, "segments": True}
RESULTS: dict[str, Problem] = {
    "bfloat16, 128, causal": Problem(high=0, out=mx.bfloat16, lse=True),
    "bfloat16, 128, a state": Problem(state=True),
    "bfloat16, 128, causal, a state": Problem(high=0, state=True, out=mx.bfloat16, lse=True),
    "float16, 64, everything": Problem(
        mx.float16, (64, 64), mask=mx.bool_, state=True, out=mx.float16, lse=True, sinks=True, **EVERYTHING
    ),
    "bfloat16, 64": Problem(dims=(64, 64), out=mx.bfloat16),
    "float16, 64, many rows": Problem(mx.float16, (64, 64), q_len=7000, out=mx.float32),
    "bfloat16, 256 and 80, columns": Problem(dims=(256, 80), mask=mx.bfloat16, columns=True, out=mx.bfloat16),
    "float16, 72 and 33, additive mask": Problem(mx.float16, (72, 33), mask=mx.float16, out=mx.float16),
    "float32, 128, causal": Problem(mx.float32, high=0, out=mx.float32),
    "float32, 256 and 33, everything": Problem(
        mx.float32, (256, 33), mask=mx.float32, columns=True, state=True, **EVERYTHING
    ),
    "float16, 80 and 32, keys split": Problem(mx.float16, (80, 32), 1, 2048, out=mx.float16, lse=True, sinks=True),
    "bfloat16, 128, keys split": Problem(q_len=1, k_len=2048, out=mx.bfloat16),
    "bfloat16, 128, keys of the last tiles split": Problem(q_len=2200, k_len=2048, out=mx.bfloat16, lse=True),
    "float16, 64, many rows, keys of the last tiles split": Problem(mx.float16, (64, 64), q_len=7000, k_len=2048),
    "float16, 64, keys of the last tiles split, a state": Problem(
        mx.float16, (64, 64), q_len=2200, k_len=2048, state=True
    ),
    "float32, 64, keys split, a state": Problem(mx.float32, (64, 64), 1, 2048),
    "bfloat16, 128, 20 queries": Problem(q_len=20, heads=(2, 2), high=0, out=mx.bfloat16),
}
GRADIENTS: dict[str, Problem] = {
    "gradient, bfloat16, 128, causal": Problem(high=0, gradient=True),
    "gradient, bfloat16, 64": Problem(dims=(64, 64), heads=(2, 2), gradient=True),
    "gradient, bfloat16, 128, sums": Problem(heads=(2, 2), gradient=True, sums=True),
    "gradient, float16, 80 and 33, everything": Problem(
        mx.float16, (80, 33), 699, 699, mask=mx.bool_, gradient=True, **EVERYTHING
    ),
    "gradient, bfloat16, 64, columns": Problem(dims=(64, 64), mask=mx.float32, columns=True, gradient=True),
    "gradient, bfloat16, 256, causal": Problem(dims=(256, 256), high=0, gradient=True),
    "gradient, float16, 192 and 128, softcap": Problem(mx.float16, (192, 128), softcap=2.0, gradient=True),
    "gradient, bfloat16, 256, additive mask": Problem(dims=(256, 256), mask=mx.bfloat16, gradient=True),
    "gradient, float32, 64, everything": Problem(mx.float32, (64, 64), mask=mx.float32, gradient=True, **EVERYTHING),
    "gradient, float32, 256, sums": Problem(mx.float32, (256, 256), gradient=True, sums=True),
}
MEMORY: dict[str, Callable[[], Any]] = {
    "pack": lambda: memory_kernels.pack_kernel.__wrapped__(tuple(ARRAYS)),
    "addresses": lambda: memory_kernels.addresses_kernel.__wrapped__(tuple(ARRAYS), (mx.float32,)),
    "new arrays": lambda: memory_kernels.addresses_kernel.__wrapped__((), tuple(ARRAYS)),
}
ARRAYS = (mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.bool_)
VARIANTS = [*RESULTS, *GRADIENTS, *MEMORY]


def calls_of(variant: str, architecture: str) -> list[KernelCall]:
    """The kernel calls of a variant on a GPU of `architecture`."""
    if variant in MEMORY:
        return [memory_call(MEMORY[variant])]
    found: list[KernelCall] = []

    def executor(call: KernelCall) -> list[mx.array]:
        found.append(call)
        return zeros(call)

    results_of(variant, architecture, executor)
    return found


def results_of(variant: str, architecture: str, executor: Callable[[KernelCall], list[mx.array]]) -> list[mx.array]:
    """The results of a variant whose calls, those on a GPU of `architecture`, `executor` runs. None is tried before."""
    with gpu(ARCHITECTURES[architecture]), mock.patch.object(launch.launcher, "executor", executor):
        return (RESULTS | GRADIENTS)[variant].run()


def zeros(call: AnyCall) -> list[mx.array]:
    """Zeros in the place of the outputs of a call."""
    return [mx.zeros(shape, dtype) for shape, dtype in zip(call.output_shapes, call.output_dtypes)]


@contextmanager
def gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Prepare calls as on a GPU of this compute capability, and keep none of them."""
    shared = device.SHARED_BYTES.get(capability, device.LEAST_SHARED_BYTES)
    with ExitStack() as stack:
        for module in (dispatch, gradient_plans):
            stack.enter_context(mock.patch.object(module, "capability", lambda: capability))
            stack.enter_context(mock.patch.object(module, "shared_bytes", lambda: shared))
        for module, name in KEPT:
            stack.enter_context(mock.patch.object(module, name, Kept(64)))
        yield


def memory_call(build: Callable[[], Any]) -> KernelCall:
    """The call of a kernel of `memory_kernels`, for arrays of `ARRAYS`."""
    built: dict[str, Any] = {}
    with mock.patch.object(mx.fast, "cuda_kernel", built.update, create=True):
        build()
    made, read = built["output_names"], built["input_names"]
    dtypes = dict(zip((f"x{i}" for i in range(len(ARRAYS))), ARRAYS)) | {"box": mx.uint64}
    return KernelCall(
        **{"header": "", **built},
        inputs=[mx.zeros((1, 1, 1, 1), dtypes[name]) for name in read],
        template=[],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1, 1, 1, 1)] * len(made),
        output_dtypes=list(ARRAYS[: len(made)]),
    )

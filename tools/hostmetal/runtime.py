"""Execution of a `KernelCall` on the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import re

import mlx.core as mx
import numpy as np

from ringattn.metal.launch import KernelCall

from .compiler import kernel_function
from .counters import Counters
from .faults import LintError, RuntimeFault
from .launch import ORDERS, Launch, Region
from .lint import lint
from .memory import Mapping, map_input, map_output, raw_dtype, raw_view, to_mlx
from .rewrite import to_host
from .source import Parameter, call_entry, kernel_text, parameters

TO_BFLOAT = re.compile(r"^.*: implicit conversion .* to '(?:[^']*bf16|[^']*bfloat\w*)'.*$", re.MULTILINE)


class Runtime:
    """Executor for `ringattn.metal.set_executor` that runs the Metal source itself and checks it.

    Every memory access is checked against the bounds of its buffer. `checks` adds checks for races, reads of
    uninitialised memory, and outputs that are not written.

    Args:
        order: The order of threads between two synchronisations: ``"forward"``, ``"backward"`` or ``"shuffled"``.
        seed: The seed of the shuffled order.
        checks: Whether to check for races and for uninitialised memory.
        workers: The number of operating system threads that run threadgroups. Default: one for each core, up to 4.
    """

    def __init__(self, order: str = "forward", seed: int = 0, checks: bool = True, workers: int | None = None) -> None:
        if order not in ORDERS:
            raise ValueError(f"{order=} must be one of {', '.join(ORDERS)}")
        self.order = order
        self.seed = seed
        self.checks = checks
        self.workers = workers or min(4, len(os.sched_getaffinity(0)))
        self.reset()

    def reset(self) -> None:
        self.counters = Counters()
        self.last = Counters()

    def __call__(self, call: KernelCall) -> list[mx.array]:
        outputs = self.run(call)
        return [to_mlx(outputs[name], dtype) for name, dtype in zip(call.output_names, call.output_dtypes)]

    def run(
        self,
        call: KernelCall,
        buffers: dict[str, np.ndarray] | None = None,
        groups: list[tuple[int, int, int]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run a kernel on raw memory.

        Args:
            call: The kernel. Its inputs give the types, and the values that `buffers` does not have.
            buffers: Inputs as NumPy arrays of any strides, memory maps too; bfloat16 as uint16. The kernel gets their
                shapes and strides.
            groups: The threadgroups that run. Default: all.

        Returns:
            The outputs by name, as views of the memory that the kernel wrote.

        Raises:
            RuntimeFault: If the kernel did a forbidden action.
            CompileError: If the kernel does not compile, or breaks a rule of Metal.
        """
        if call.atomic_outputs:
            raise NotImplementedError("atomic outputs do not run on the host")
        inputs = {name: self.input_memory(call, name, array, buffers or {}) for name, array in named_inputs(call)}
        outputs = {}
        mapped = []
        regions = []
        for p in parameters(call):
            if p.role == "output":
                i = call.output_names.index(p.name)
                shape = tuple(call.output_shapes[i])
                dtype = call.output_dtypes[i]
                outputs[p.name], mapping = map_output(raw_dtype(dtype), shape, call.init_value)
                if call.init_value is not None:
                    outputs[p.name][...] = raw_view(mx.array(call.init_value, dtype))
                kind = "output" if call.init_value is None else "initialised_output"
                regions.append(Region(p.name, kind, mapping.base, mapping.size, dtype.size))
            else:
                array = facts(p, inputs[p.of])
                mapping = map_input(array)
                kind = "input" if p.space == "device" else "constant"
                regions.append(Region(p.name, kind, mapping.base, mapping.size, array.itemsize))
            mapped.append(mapping)
        self.launch(call, mapped, regions, groups)
        return outputs

    def input_memory(self, call: KernelCall, name: str, array: mx.array, buffers: dict[str, np.ndarray]) -> np.ndarray:
        if name in buffers:
            given = buffers[name]
            wanted = raw_dtype(array.dtype)
            if given.dtype != wanted:
                raise TypeError(f"buffers[{name!r}] must be {wanted}, got {given.dtype}")
            return given
        return raw_view(mx.contiguous(array) if call.ensure_row_contiguous else array)

    def launch(
        self, call: KernelCall, mapped: list[Mapping], regions: list[Region], groups: list[tuple[int, int, int]] | None
    ) -> None:
        library, entry = checked_function(call.name, kernel_text(call), call_entry(call))
        launch = Launch(entry, [m.start for m in mapped], regions, call.grid, call.threadgroup, groups)
        self.run_launch(call.name, launch)

    def run_launch(self, name: str, launch: Launch) -> None:
        self.last, reports = launch.run(self.order, self.seed, self.checks, self.workers)
        if reports and self.workers > 1:  # run again, so that reports do not vary
            self.last, again = launch.run(self.order, self.seed, self.checks, 1)
            reports = again or reports
        self.counters = self.counters + self.last
        if reports:
            raise RuntimeFault(name, reports)


@functools.cache
def checked_function(name: str, plain: str, entry: str) -> tuple[ctypes.CDLL, int]:
    """Compile the text of a kernel. Return the library and the address of its entry. Keep the library alive.

    Raises:
        LintError: If the text breaks a rule of Metal that the compiler does not know.
        CompileError: If it does not compile.
    """
    found = lint(plain)
    if not found:
        text = f'#include "mlx_utils.h"\n#include "hostmetal_entry.h"\n#line 1 "{name}"\n{to_host(plain)}{entry}'
        library, address, notes = kernel_function(text)
        found = TO_BFLOAT.findall(notes)  # Metal converts a wider type to bfloat only with a cast
    if found:
        raise LintError("\n".join([f"kernel {name}:", *found]))
    return library, address


def named_inputs(call: KernelCall) -> list[tuple[str, mx.array]]:
    return list(zip(call.input_names, call.inputs))


def facts(p: Parameter, memory: np.ndarray) -> np.ndarray:
    """Return the input itself, or its property that a parameter names."""
    if p.role == "shape":
        return np.array(memory.shape, np.int32)
    if p.role == "strides":
        return np.array([stride // memory.itemsize for stride in memory.strides], np.int64)
    if p.role == "ndim":
        return np.array(memory.ndim, np.int32)
    return memory

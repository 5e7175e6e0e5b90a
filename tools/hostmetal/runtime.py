"""Runs a `KernelCall` on the host."""

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
    """An executor for `ringattn.metal.set_executor` that runs the Metal source itself, and watches it.

    Every access to memory is checked against the bounds of its buffer; with `checks` also for races, reads of what was
    never written, and outputs left unwritten.

    Args:
        order: In which order threads run between two meetings: ``"forward"``, ``"backward"`` or ``"shuffled"``.
        seed: Of the shuffled order.
        checks: Whether to look for races and for memory that was never written.
        workers: How many threads of the operating system run threadgroups; by default one for each core, up to 4.
    """

    def __init__(self, order: str = "forward", seed: int = 0, checks: bool = True, workers: int | None = None) -> None:
        if order not in ORDERS:
            raise ValueError(f"{order=} must be one of {', '.join(ORDERS)}")
        self.order, self.seed, self.checks = order, seed, checks
        self.workers = workers or min(4, len(os.sched_getaffinity(0)))
        self.reset()

    def reset(self) -> None:
        self.counters, self.last = Counters(), Counters()

    def __call__(self, call: KernelCall) -> list[mx.array]:
        outputs = self.run(call)
        return [to_mlx(outputs[name], dtype) for name, dtype in zip(call.output_names, call.output_dtypes)]

    def run(
        self,
        call: KernelCall,
        buffers: dict[str, np.ndarray] | None = None,
        groups: list[tuple[int, int, int]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs a kernel on raw memory.

        Args:
            call: The kernel; its inputs give the types and, where `buffers` has nothing, the values.
            buffers: Inputs as NumPy arrays of any strides, memory maps too; bfloat16 as uint16. Shapes and strides that
                the kernel asks for are theirs.
            groups: The threadgroups that run; without it all do.

        Returns:
            The outputs by name, as views of the memory that the kernel wrote.

        Raises:
            RuntimeFault: The kernel did what it must not do.
            CompileError: It does not compile, or breaks a rule of Metal.
        """
        if call.atomic_outputs:
            raise NotImplementedError("atomic outputs do not run on the host")
        inputs = {name: self.input_memory(call, name, array, buffers or {}) for name, array in named_inputs(call)}
        outputs, mapped, regions = {}, [], []
        for p in parameters(call):
            if p.role == "output":
                i = call.output_names.index(p.name)
                shape, dtype = tuple(call.output_shapes[i]), call.output_dtypes[i]
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
            given, wanted = buffers[name], raw_dtype(array.dtype)
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
        if reports and self.workers > 1:  # once more, so that what is reported is always the same
            self.last, again = launch.run(self.order, self.seed, self.checks, 1)
            reports = again or reports
        self.counters = self.counters + self.last
        if reports:
            raise RuntimeFault(name, reports)


@functools.cache
def checked_function(name: str, plain: str, entry: str) -> tuple[ctypes.CDLL, int]:
    """Compiles the text of a kernel; the library has to live while its entry, the address beside it, is used.

    Raises:
        LintError: It breaks a rule of Metal that the compiler does not know.
        CompileError: It does not compile.
    """
    found = lint(plain)
    if not found:
        text = f'#include "mlx_utils.h"\n#include "hostmetal_entry.h"\n#line 1 "{name}"\n{to_host(plain)}{entry}'
        library, address, notes = kernel_function(text)
        found = TO_BFLOAT.findall(notes)  # Metal makes a bfloat of a wider type only where it is told to
    if found:
        raise LintError("\n".join([f"kernel {name}:", *found]))
    return library, address


def named_inputs(call: KernelCall) -> list[tuple[str, mx.array]]:
    return list(zip(call.input_names, call.inputs))


def facts(p: Parameter, memory: np.ndarray) -> np.ndarray:
    """The input itself, or what a parameter says of it."""
    if p.role == "shape":
        return np.array(memory.shape, np.int32)
    if p.role == "strides":
        return np.array([stride // memory.itemsize for stride in memory.strides], np.int64)
    if p.role == "ndim":
        return np.array(memory.ndim, np.int32)
    return memory

"""Structures of the C++ core, and a launch."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np

from .compiler import core_library
from .counters import Counters
from .faults import KINDS, Report

U32x3 = ctypes.c_uint32 * 3
KIND = {"constant": 0, "input": 1, "output": 2, "initialised_output": 3, "module": 5}
GROUPS_PER_WORKER = 4  # at least: starting a thread costs more than a small threadgroup
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
COUNTED = ["matmuls", "tensor_ops", "exp2", "exp", "log", "tanh", "barriers", "simdgroup_barriers", "shuffles"]
COUNTED += ["threadgroup_read", "threadgroup_written", "threadgroup_bytes", "bank_conflicts", "groups"]


class CBuffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("cells", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("element", ctypes.c_uint32),
    ]


class CReport(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("thread", ctypes.c_uint32),
        ("group", U32x3),
        ("buffer", ctypes.c_char * 60),
        ("offset", ctypes.c_int64),
        ("text", ctypes.c_char * 360),
    ]


class CLaunch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("buffers", ctypes.POINTER(CBuffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", U32x3),
        ("threadgroup", U32x3),
        ("groups", ctypes.c_void_p),
        ("group_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_int32),
        ("checks", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("report_count", ctypes.c_int32),
        ("counters", ctypes.c_uint64 * len(COUNTED)),
        ("reports", CReport * 8),
    ]


@dataclass(frozen=True)
class Region:
    """Memory that a kernel may access: a buffer, or its constants.

    Attributes:
        name: The name in reports and counters.
        kind: A key of `KIND`.
        base: The address of the first byte.
        size: The size in bytes.
        element: The bytes of an element.
    """

    name: str
    kind: str
    base: int
    size: int
    element: int


@dataclass(frozen=True)
class Launch:
    """One run of a compiled kernel.

    Attributes:
        kernel: The address of the kernel's entry.
        arguments: The addresses that are the kernel's arguments.
        regions: The memory that the kernel may access.
        grid: The number of all threads.
        threadgroup: The number of threads of a threadgroup.
        groups: The threadgroups that run; ``None`` for all.
    """

    kernel: int
    arguments: list[int]
    regions: list[Region]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    groups: list[tuple[int, int, int]] | None = None

    def run(self, order: str, seed: int, checks: bool, workers: int) -> tuple[Counters, list[Report]]:
        _, core = core_library()
        threadgroup = tuple(map(min, self.threadgroup, self.grid))
        if math.prod(threadgroup) > 1024:
            raise ValueError(f"threadgroup={self.threadgroup} has more than 1024 threads")
        buffers = (CBuffer * len(self.regions))(
            *(CBuffer(r.name.encode(), r.base, r.size, 0, 0, None, KIND[r.kind], r.element) for r in self.regions)
        )
        arguments = (ctypes.c_void_p * len(self.arguments))(*self.arguments)
        chosen = None if self.groups is None else np.array(self.groups, np.uint32).reshape(-1, 3)
        count = math.prod(-(-n // t) for n, t in zip(self.grid, threadgroup)) if chosen is None else len(chosen)
        c = CLaunch(kernel=self.kernel, arguments=arguments, buffers=buffers, buffer_count=len(buffers))
        c.grid = U32x3(*self.grid)
        c.threadgroup = U32x3(*threadgroup)
        c.group_count = count
        c.groups = None if chosen is None else chosen.ctypes.data
        c.seed = seed
        c.order = ORDERS[order]
        c.checks = checks
        c.workers = max(1, min(workers, count // GROUPS_PER_WORKER))
        core.hostmetal_launch(ctypes.byref(c))
        reports = [
            Report(KINDS[r.kind], r.buffer.decode(), r.offset, r.thread, tuple(r.group), r.text.decode())
            for r in c.reports[: c.report_count]
        ]
        return self.counted(c, buffers), reports

    def counted(self, c: CLaunch, buffers: ctypes.Array[CBuffer]) -> Counters:
        counters = Counters(**dict(zip(COUNTED, c.counters)))
        for region, buffer in zip(self.regions, buffers):
            if region.kind in ("constant", "module"):
                counters.constant_read += buffer.read
            elif region.kind == "input":
                counters.device_read[region.name] = buffer.read
            else:
                counters.device_written[region.name] = buffer.written
                if buffer.read:
                    counters.device_read[region.name] = buffer.read
        return counters

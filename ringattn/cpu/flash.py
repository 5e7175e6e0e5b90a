"""The compiled kernels of this processor (``native/*.c``), called for one key/value head of a unit at a time.

``pip install`` compiles them if there is a C compiler. They are optional: NumPy does the same, more slowly. ctypes
releases the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..core.gradients import Rows
from ..native import load
from .tile_masks import WorkUnit
from .work_units import WorkUnits, buffer

KEYS = 192  # keys in a tile: the scores of a block of rows stay in the first-level cache, in whole blocks of registers
DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2, np.dtype(bool): 3}  # bfloat16 bits


INTEGERS = ("dtype", "mask_dtype", "out_dtype", "q_len", "k_len", "dim", "v_dim", "group", "chunk")


class Array(ctypes.Structure):
    """An array ``[batch, head, row, column]`` with strides in bytes, 0 along a broadcast axis."""

    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("batch", "head", "row", "column"))]

    @classmethod
    def of(cls, x: np.ndarray | None) -> Array:
        """Describe `x`, of up to four axes; ``None`` gives NULL."""
        if x is None:
            return cls()
        strides = [0 if n == 1 else stride for n, stride in zip(x.shape, x.strides)]
        return cls(_address(x), *strides)


class Call(ctypes.Structure):
    """Arguments of one kernel call, as in ``native/call.h``."""

    _fields_ = [
        *((name, Array) for name in ("q", "k", "v", "mask", "acc", "m", "l", "out", "lse")),
        *((name, c_void_p) for name in ("sinks", "first", "last", "q_ids", "k_ids", "columns")),
        *((name, c_int64) for name in INTEGERS),
        ("scale", c_double),
        ("softcap", c_double),
    ]


class GradientArrays(ctypes.Structure):
    """Further arguments of a backward call, as in ``native/call.h``."""

    _fields_ = [*((name, Array) for name in ("dout", "lse", "delta", "dq", "dk", "dv")), ("dtype", c_int64)]


class Unit(ctypes.Structure):
    """Queries ``start:stop`` of a key/value head, as in ``native/call.h``."""

    _fields_ = [(name, c_int64) for name in ("batch", "head", "start", "stop")]


FUNCTIONS: dict[str, list] = {
    "ringattn_flash_sets": [],
    "ringattn_flash_name": [c_int64],
    "ringattn_flash_scratch": [c_int64, c_void_p, c_int64],
    "ringattn_flash_forward": [c_int64, c_void_p, c_void_p, c_void_p],
    "ringattn_flash_backward_scratch": [c_int64, c_void_p, c_int64],
    "ringattn_flash_backward": [c_int64, c_void_p, c_void_p, c_void_p, c_void_p],
}


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """Load the library; ``None`` where it was not compiled."""
    library = load(Path(__file__).with_name("_flash"), FUNCTIONS)
    if library is not None:
        library.ringattn_flash_name.restype = c_char_p
        for name in ("sets", "scratch", "backward_scratch"):
            getattr(library, f"ringattn_flash_{name}").restype = c_int64
    return library


@lru_cache(maxsize=1)
def instruction_set() -> int:
    """Return the number of the best instruction set that this processor has."""
    library = compiled()
    return 0 if library is None else library.ringattn_flash_sets() - 1


def instruction_sets() -> list[str]:
    """List the names of the instruction sets that this processor has, the best one last; empty without the library."""
    library = compiled()
    return [] if library is None else [library.ringattn_flash_name(i).decode() for i in range(instruction_set() + 1)]


class Compiled:
    """Compiled kernels for one call."""

    def __init__(self, work: WorkUnits) -> None:
        library = compiled()
        assert library is not None
        self._library = library
        self._set = instruction_set()
        self._call, self._kept = _call(work)
        self._address = ctypes.addressof(self._call)
        self._queries = max(1, min(len(work.q_pos), work.queries))

    def forward(self, acc: np.ndarray, m: np.ndarray, l: np.ndarray) -> Callable[[WorkUnit], None]:
        """Prepare the forward pass. It returns a function that updates the state of a unit's rows."""
        for name, x in (("acc", acc), ("m", m), ("l", l)):
            setattr(self._call, name, Array.of(x))
        self._kept += [acc, m, l]
        return self._forward()

    def finish(self, out: np.ndarray, lse: np.ndarray, sinks: np.ndarray | None) -> Callable[[WorkUnit], None]:
        """Prepare the forward pass without a state before. It returns a function that writes the results of a unit."""
        self._call.out = Array.of(out)
        self._call.lse = Array.of(lse)
        self._call.out_dtype = DTYPES[out.dtype]
        self._call.sinks = None if sinks is None else _address(sinks)
        self._kept += [out, lse, sinks]
        return self._forward()

    def _forward(self) -> Callable[[WorkUnit], None]:
        scratch = self._library.ringattn_flash_scratch(self._set, self._address, self._queries)

        def run(unit: WorkUnit) -> None:
            memory = _address(buffer("flash", (scratch,)))
            for head in _heads(unit):
                self._library.ringattn_flash_forward(self._set, self._address, ctypes.addressof(head), memory)

        return run

    def backward(self, rows: Rows, dq: np.ndarray) -> Callable[[WorkUnit, np.ndarray, np.ndarray], None]:
        """Prepare the backward pass. It returns a function that adds the gradients of a unit to `dq` and to the sums of
        the unit's heads, ``[heads, Lk, D]`` and ``[heads, Lk, Dv]``.
        """
        given = GradientArrays(*map(Array.of, (*rows, dq)))
        given.dtype = DTYPES[rows.dout.dtype]
        self._kept += [rows, dq]
        scratch = self._library.ringattn_flash_backward_scratch(self._set, self._address, self._queries)

        def run(unit: WorkUnit, dk: np.ndarray, dv: np.ndarray) -> None:
            memory = _address(buffer("flash", (scratch,)))
            for head, sums_k, sums_v in zip(_heads(unit), dk, dv):
                sums = GradientArrays.from_buffer_copy(given)
                sums.dk = Array.of(sums_k[None, None])
                sums.dv = Array.of(sums_v[None, None])
                addresses = self._address, ctypes.addressof(sums), ctypes.addressof(head), memory
                self._library.ringattn_flash_backward(self._set, *addresses)

        return run


def _heads(unit: WorkUnit) -> Iterator[Unit]:
    """Yield each key/value head of a unit."""
    for head in range(unit.first, unit.last):
        yield Unit(unit.batch, head, unit.start, unit.stop)


def _call(work: WorkUnits) -> tuple[Call, list]:
    """Describe a call, and return it with the arrays that must live as long as it."""
    rules, masks = work.rules, work.tile_mask
    q_pos = work.q_pos
    first, last = (x.astype(np.int32) for x in rules.band.index_ranges(q_pos, q_pos, work.k_pos))
    q_ids, k_ids = (None if x is None else np.ascontiguousarray(x, np.int32) for x in (masks.q_ids, masks.k_ids))
    columns = None if masks.columns is None else np.ascontiguousarray(masks.columns, np.int64)
    call = Call(*map(Array.of, (work.q, work.k, work.v, masks.mask)))
    call.first = _address(first)
    call.last = _address(last)
    call.q_ids = None if q_ids is None else _address(q_ids)
    call.k_ids = None if k_ids is None else _address(k_ids)
    call.columns = None if columns is None else _address(columns)
    call.dtype = DTYPES[work.q.dtype]
    call.mask_dtype = 0 if masks.mask is None else DTYPES[masks.mask.dtype]
    call.q_len = len(q_pos)
    call.k_len = len(work.k_pos)
    call.dim = work.q.shape[3]
    call.v_dim = work.v.shape[3]
    call.group = work.group
    call.chunk = KEYS
    call.scale = rules.scale
    call.softcap = rules.softcap or 0
    return call, [work, first, last, q_ids, k_ids, columns]


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]  # takes half the time of x.ctypes

"""Run of kernel calls: compile the text for the CPU, hand over the arrays, take the outputs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from ringattn.cuda import KernelCall

from .translate import translate

INCLUDE = Path(__file__).parent / "include"
TYPES = {
    mx.float32: ("float", np.float32),
    mx.float16: ("__half", np.uint16),
    mx.bfloat16: ("__nv_bfloat16", np.uint16),
    mx.int32: ("int32_t", np.int32),
    mx.bool_: ("bool", np.bool_),
    mx.uint32: ("uint32_t", np.uint32),
    mx.uint64: ("uint64_t", np.uint64),
}
HALVES = (mx.float16, mx.bfloat16)
AXES = 8  # of MLX's shapes and strides
CU = "mlx::core::cu::"
MARK = "int hostcuda_body_follows;"
DECLARED_MEMORY = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?unsigned char memory\[\];")
MEMORY = "unsigned char* const memory = host::shared;"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off"]
PROGRAM = """#include "launch.h"
{header}
namespace mlx::core::cu {{
{declared}
static void body() {{
{body}
}}
}}
extern "C" const char* run(void** pointer, int** shape, int64_t** strides, const unsigned (&grid)[3], int block,
                           size_t bytes, int late, int find_races) {{
{handed}
  host::kernel = mlx::core::cu::body;
  return host::launch(grid, block, bytes, late, find_races);
}}
"""


class KernelError(RuntimeError):
    """A kernel that does what a GPU does not allow, or whose result is undefined there."""


@dataclass(frozen=True)
class Runtime:
    """An executor for `ringattn.cuda.launch.set_executor`.

    Attributes:
        late: Whether copies and products of `wgmma` have their effect when they are waited for, not at once, and the
            blocks run from the last to the first. Results must be the same.
        races: Whether to look for races in shared memory. This takes ten times as long, and is right for kernels whose
            only barrier is `__syncthreads`.
    """

    late: bool = False
    races: bool = False

    def __call__(self, call: KernelCall) -> list[mx.array]:
        """Run `call`.

        Raises:
            KernelError: If a thread waits for ever, an address is wrong, or threads race.
        """
        library = compiled(program(call), self.races)
        inputs = [host_array(x) for x in call.inputs]
        outputs = [empty(shape, dtype, call.init_value) for shape, dtype in zip(call.output_shapes, call.output_dtypes)]
        library.run.restype = ctypes.c_char_p
        problem = library.run(
            pointers([x.ctypes.data for x in inputs + outputs]),
            numbers([x.shape for x in inputs], ctypes.c_int32),
            numbers([[s // x.itemsize for s in x.strides] for x in inputs], ctypes.c_int64),
            (ctypes.c_uint * 3)(*(a // b for a, b in zip(call.grid, call.threadgroup))),
            call.threadgroup[0],
            ctypes.c_size_t(call.shared_memory),
            int(self.late),
            int(self.races),
        )
        if problem is not None:
            raise KernelError(f"{call.name}: {problem.decode()}")
        return [mx_array(x, dtype) for x, dtype in zip(outputs, call.output_dtypes)]


def program(call: KernelCall) -> str:
    """The C++ program for `call`."""
    text = translate(preprocessed(f"{call.header}\n{MARK}\n{call.source}"))
    header, body = text.split(MARK)
    declared, handed = [], []
    names = [*call.input_names, *call.output_names]
    dtypes = [x.dtype for x in call.inputs] + call.output_dtypes
    for i, (name, dtype) in enumerate(zip(names, dtypes)):
        kind = f"{'const ' if i < len(call.inputs) else ''}{TYPES[dtype][0]}*"
        declared.append(f"static {kind} {name};")
        handed.append(f"  {CU}{name} = static_cast<{kind}>(pointer[{i}]);")
    for i, name in enumerate(call.input_names):
        declared.append(f"static Shape {name}_shape;\nstatic Strides {name}_strides;")
        handed += [f"  std::memcpy(&{CU}{name}_{x}, {x}[{i}], sizeof {CU}{name}_{x});" for x in ("shape", "strides")]
    body = DECLARED_MEMORY.sub(MEMORY, body)
    return PROGRAM.format(header=header, body=body, declared="\n".join(declared), handed="\n".join(handed))


def lacking() -> str | None:
    """The program that this machine lacks to run kernels, or ``None``."""
    return None if shutil.which("g++") else "g++"


def preprocessed(text: str) -> str:
    """`text` without comments and macros."""
    command = ["g++", "-E", "-P", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


@cache
def folder() -> Path:
    """Where compiled programs are kept: a folder of the user's own, as what lies in it is loaded as code."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostcuda"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@cache
def compiled(text: str, races: bool) -> ctypes.CDLL:
    """The library of a program. A fresh copy each time it is loaded would share nothing with others."""
    flags = [*FLAGS, *(["-fsanitize=thread"] if races else []), f"-I{INCLUDE}"]
    parts = [text, *flags, *(path.read_text() for path in sorted(INCLUDE.iterdir()))]
    target = folder() / f"{hashlib.blake2b(chr(0).join(parts).encode(), digest_size=16).hexdigest()}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:
            build(text, flags, Path(scratch)).replace(target)
    return ctypes.CDLL(str(target))


def build(text: str, flags: list[str], scratch: Path) -> Path:
    """Compile a program; the sanitizer's own library is not linked.

    Raises:
        KernelError: With what the compiler says.
    """
    source, object_, library = (scratch / f"kernel.{end}" for end in ("cpp", "o", "so"))
    source.write_text(text)
    for command in ([*flags, "-c", str(source), "-o", str(object_)], ["-shared", str(object_), "-o", str(library)]):
        done = subprocess.run(["g++", *command], capture_output=True, text=True)
        if done.returncode:
            raise KernelError(f"the kernel does not compile: {done.stderr[:2000]}")
    return library


def aligned(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """New memory that begins at a multiple of 16 bytes, as an array of MLX does."""
    count = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = np.empty(count + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + count].view(kind).reshape(shape)


def host_array(x: mx.array) -> np.ndarray:
    """A copy of an input, contiguous; 16-bit floats as their bits."""
    plain = np.array(mx.contiguous(x).view(mx.uint16) if x.dtype in HALVES else x)
    copy = aligned(plain.shape, TYPES[x.dtype][1])
    copy[...] = plain
    return copy


def empty(shape: tuple[int, ...], dtype: mx.Dtype, value: float | None) -> np.ndarray:
    """An output before the kernel writes it: NaN, or the value that the call asks for."""
    x = aligned(tuple(shape), TYPES[dtype][1])
    x[...] = (
        np.array(mx.array(np.nan if value is None else value, dtype).view(mx.uint16))
        if dtype in HALVES
        else (np.nan if value is None and dtype == mx.float32 else value or 0)
    )
    return x


def mx_array(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """An output as an array of MLX."""
    return mx.array(x).view(dtype) if dtype in HALVES else mx.array(x)


def pointers(addresses: list[int]) -> ctypes.Array:
    """An array of pointers."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


def numbers(rows: list, kind: type) -> ctypes.Array:
    """An array of pointers to `AXES` numbers each."""
    held = [(kind * AXES)(*row) for row in rows]
    array = (ctypes.POINTER(kind) * len(held))(*(ctypes.cast(x, ctypes.POINTER(kind)) for x in held))
    array.held = held
    return array

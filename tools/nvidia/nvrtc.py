"""NVRTC, NVIDIA's run-time compiler, which needs no GPU: ``pip install 'ringattn[cuda-compiler]'``."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime")  # the compiler, and headers
FOLDER = "nvidia/cu13"  # of these packages of CUDA 13
# What MLX asks for, and what ptxas says of registers, spills and shared memory
OPTIONS = ("--device-as-default-execution-space", "--ptxas-options=-v", "--diag-suppress=177")  # 177: unused names


class CompileError(RuntimeError):
    """A text that the compiler refuses."""


def lacking() -> str | None:
    """The packages that are not installed, or ``None``."""
    found = [name for name in PACKAGES if not installed(name)]
    return f"not installed: {', '.join(found)}; pip install 'ringattn[cuda-compiler]'" if found else None


def installed(package: str) -> bool:
    """Return whether a package of `PACKAGES` is installed."""
    try:
        return distribution(package).version.startswith("13.")
    except PackageNotFoundError:
        return False


def compiled(text: str, architecture: str) -> str:
    """Compile a program to machine code, and return the compiler's log.

    Args:
        text: A program in CUDA C++.
        architecture: That of the GPU, such as ``"sm_90a"``.

    Raises:
        CompileError: If the compiler refuses the program.
    """
    nvrtc = library()
    options = [f"--gpu-architecture={architecture}", f"-I{located(PACKAGES[1], 'include')}", *OPTIONS]
    program = ctypes.c_void_p()
    if code := nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None):
        raise CompileError(nvrtc.nvrtcGetErrorString(code).decode())
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if code:
        raise CompileError(f"{nvrtc.nvrtcGetErrorString(code).decode()} for {architecture}:\n{log.value.decode()}")
    return log.value.decode()


@cache
def library() -> ctypes.CDLL:
    """Load the library.

    Raises:
        RuntimeError: If a package is not installed.
    """
    if problem := lacking():
        raise RuntimeError(problem)
    nvrtc = ctypes.CDLL(located(PACKAGES[0], "lib/libnvrtc.so.13"))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def located(package: str, path: str) -> str:
    """The place of a file of a package."""
    return str(distribution(package).locate_file(f"{FOLDER}/{path}"))

"""Search for a compiler, and a cache of its output."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .faults import CompileError

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
CORE = HERE / "core"
OLDEST = 19  # of clang: older versions fail on bfloat arithmetic

COMMON = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fno-stack-protector"]
COMMON += ["-fno-sanitize=undefined", "-fvisibility=hidden", "-g0"]
CORE_FLAGS = ["-O2", "-fvisibility=default", "-fno-strict-aliasing"]
KERNEL_FLAGS = [
    "-O1",
    "-nostdinc",
    "-ffreestanding",
    "-fbuiltin",
    "-fno-strict-aliasing",
    *("-mllvm", "-regalloc=fast", "-mllvm", "-optimize-regalloc=0"),  # compiles in two thirds of the time
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-ftrivial-auto-var-init=pattern",
    # every memory access becomes a call; the sanitizer's library is not linked
    *("-Xclang", "-fsanitize=thread"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    # in Metal 1.0 is a float, and arithmetic in half is rounded to half
    *("-Xclang", "-cl-single-precision-constant"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    *("-Wno-everything", "-Wimplicit-float-conversion"),
]


def cache_directory() -> Path:
    """A folder of the user's own: what is found in it is loaded as code."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostmetal"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def version_of(command: tuple[str, ...]) -> str | None:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def new_enough(version: str | None) -> bool:
    found = re.search(r"clang version (\d+)", version or "")
    return bool(found) and int(found.group(1)) >= OLDEST


@functools.cache
def find_compiler() -> tuple[tuple[str, ...], str]:
    """Find the command and its version: ``RINGATTN_CLANG``, or a clang of `OLDEST` or later, or Zig's from PyPI."""
    wanted = os.environ.get("RINGATTN_CLANG")
    if wanted:
        command = tuple(wanted.split())
        version = version_of(command)
        if not new_enough(version):
            raise CompileError(f"RINGATTN_CLANG={wanted} is not clang {OLDEST} or later: {version}")
        return command, version
    names = [f"clang++-{n}" for n in range(OLDEST, OLDEST + 12)] + ["clang++"]
    for command in [(name,) for name in names if shutil.which(name)] + [(sys.executable, "-m", "ziglang", "cc")]:
        version = version_of(command)
        if new_enough(version):
            return command, version
    raise CompileError(f"no clang {OLDEST} or later: install one, or `pip install ziglang`, or set RINGATTN_CLANG")


def is_zig(command: tuple[str, ...]) -> bool:
    return "ziglang" in command or Path(command[0]).name.startswith("zig")


def processor_flags(command: tuple[str, ...]) -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return ["-mcpu=x86_64_v3"] if is_zig(command) else ["-march=x86-64-v3"]  # has conversions of half


def build(flags: list[str], sources: list[Path], text: str, libraries: list[str]) -> tuple[Path, str]:
    """Compile `sources` or `text` once. Return the shared object and the compiler's warnings. Safe across processes."""
    command, version = find_compiler()
    flags = [*COMMON, *processor_flags(command), *flags]
    key = hashlib.sha256(repr((version, flags, libraries)).encode())
    headers = sorted(INCLUDE.rglob("*")) if text else sorted(CORE.glob("*"))
    for path in [p for p in headers if p.is_file()]:
        key.update(path.read_bytes())
    key.update(text.encode())
    target = cache_directory() / f"{key.hexdigest()[:32]}.so"
    notes = target.with_suffix(".txt")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            if text:
                sources = [Path(scratch) / "kernel.cpp"]
                sources[0].write_text(text)
            made = Path(scratch) / "made.so"
            line = [*command, *flags, "-shared", *map(str, sources), *libraries, "-o", str(made)]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                raise CompileError(first_messages(done.stderr))
            written = Path(scratch) / "notes.txt"
            written.write_text(done.stderr)
            written.replace(notes)
            made.replace(target)
    return target, notes.read_text()


def first_messages(output: str, lines: int = 40) -> str:
    return "\n".join(output.splitlines()[:lines])


@functools.cache
def core_library() -> tuple[Path, ctypes.CDLL]:
    path, _ = build(CORE_FLAGS, sorted(CORE.glob("*.cpp")), "", ["-lm", "-lpthread"])
    return path, ctypes.CDLL(str(path))


@functools.cache
def kernel_function(text: str) -> tuple[ctypes.CDLL, int, str]:
    """Compile a kernel. Return the library (keep it alive), the address of its entry, and the compiler's warnings."""
    core, _ = core_library()
    path, notes = build([*KERNEL_FLAGS, "-isystem", str(INCLUDE)], [], text, [str(core)])
    library = ctypes.CDLL(str(path))
    return library, ctypes.cast(library.hostmetal_kernel, ctypes.c_void_p).value, notes

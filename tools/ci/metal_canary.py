"""Test of the features of the Metal language on this GPU: a tiny kernel for each, compared with NumPy.

    python -m tools.ci.metal_canary [--host] [--require-gpu] [FILE]

GPUs of virtual machines lack some features. The result is one JSON object, on standard output and in FILE. Each kernel
runs in a separate process, which a driver may kill. ``--host`` runs the kernels on the CPU with ``tools.hostmetal``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ringattn.metal import KernelCall, launch, set_executor

LIMIT = 120  # seconds for one kernel, mostly for Metal's compiler
LANES = 32


@dataclass(frozen=True)
class Canary:
    """One kernel of 32 threads.

    Attributes:
        header: The Metal files that the kernel includes.
        source: The body of the kernel. It reads `x` and writes `y`.
        x: The input, float32 or bfloat16.
        y: The expected output, exactly.
    """

    header: str
    source: str
    x: mx.array
    y: np.ndarray

    def complaint(self) -> str:
        """Return the error of this kernel here, or an empty string."""
        call = KernelCall(
            name="canary",
            input_names=["x"],
            output_names=["y"],
            source=self.source,
            header=f"#include <{self.header}>\n",
            inputs=[self.x],
            template=[],
            grid=(LANES, 1, 1),
            threadgroup=(LANES, 1, 1),
            output_shapes=[self.y.shape],
            output_dtypes=[self.x.dtype],
        )
        try:
            y = np.array(launch.run(call)[0].astype(mx.float32))
        except Exception as error:  # after any exception, the feature does not work
            return " ".join(str(error).split())[:300]
        return "" if np.array_equal(y, self.y) else f"y: {y.tolist()}, expected {self.y.tolist()}"[:300]


def _canaries() -> dict[str, Canary]:
    x = np.arange(LANES, dtype=np.float32)
    a, b = np.arange(128, dtype=np.float32).reshape(2, 8, 8) % 7
    return {
        "simdgroup_matrix": Canary("metal_simdgroup_matrix", MATRIX, mx.array(np.stack([a, b])), a @ b),
        "simd_sum": Canary("metal_simdgroup", SUM, mx.array(x), x.sum() + x.max() - x),
        "simd_shuffle": Canary("metal_simdgroup", SHUFFLE, mx.array(x), x[np.arange(LANES) ^ 9] + x[3]),
        "bfloat": Canary("metal_stdlib", BFLOAT, mx.array(x).astype(mx.bfloat16), x / 4 + 1),
    }


MATRIX = """
const ushort lane = thread_position_in_threadgroup.x;
const ushort row = ((lane / 4) & 4) + (lane / 2) % 4; // of this lane's two elements
const ushort column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
metal::simdgroup_matrix<float, 8, 8> a, b, c(0.0f);
a.thread_elements()[0] = x[8 * row + column];
a.thread_elements()[1] = x[8 * row + column + 1];
b.thread_elements()[0] = x[64 + 8 * row + column];
b.thread_elements()[1] = x[64 + 8 * row + column + 1];
metal::simdgroup_multiply_accumulate(c, a, b, c);
y[8 * row + column] = c.thread_elements()[0];
y[8 * row + column + 1] = c.thread_elements()[1];
"""
SUM = """
const uint lane = thread_position_in_threadgroup.x;
y[lane] = metal::simd_sum(x[lane]) + metal::simd_max(x[lane]) + metal::simd_min(x[lane]) - x[lane];
"""
SHUFFLE = """
const uint lane = thread_position_in_threadgroup.x;
y[lane] = metal::simd_shuffle_xor(x[lane], ushort(9)) + metal::simd_shuffle(x[lane], ushort(3));
"""
BFLOAT = """
const uint lane = thread_position_in_threadgroup.x;
y[lane] = bfloat(float(x[lane]) * 0.25f + 1.0f);
"""
CANARIES = _canaries()


def run_apart(name: str, host: bool = False) -> str:
    """Run one canary in a separate process. Return its error, or an empty string."""
    line = [sys.executable, "-m", "tools.ci.metal_canary", "--only", name, *["--host"] * host]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT} s"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return done.stdout.strip() if done.returncode == 0 else f"ended with {done.returncode}: {last}"


def missing(host: bool = False) -> dict[str, str]:
    """Find the features that do not work here, with their errors."""
    complaints = {name: run_apart(name, host) for name in CANARIES}
    return {name: complaint for name, complaint in complaints.items() if complaint}


def report(host: bool = False) -> dict[str, object]:
    """Describe the device and the features for JSON."""
    there = host or mx.metal.is_available()
    return {
        "device": {name: str(value) for name, value in mx.device_info().items()},
        "default": mx.default_device().type.name,
        "metal": there,
        "features": list(CANARIES),
        "missing": missing(host) if there else dict.fromkeys(CANARIES, "no Metal"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report. Exit with 1 if a GPU was required and is not MLX's default."""
    parser = argparse.ArgumentParser(prog="python -m tools.ci.metal_canary", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="where to write the report too")
    parser.add_argument("--host", action="store_true", help="run the kernels on the CPU")
    parser.add_argument("--require-gpu", action="store_true", help="fail where MLX does not compute on an Apple GPU")
    parser.add_argument("--only", choices=CANARIES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.host:
        from tools.hostmetal import Runtime

        set_executor(Runtime())
    if options.only:
        print(CANARIES[options.only].complaint())
        return 0
    found = report(options.host)
    text = json.dumps(found, indent=2)
    print(text)
    if options.file:
        options.file.write_text(text + "\n")
    return int(options.require_gpu and not (mx.metal.is_available() and found["default"] == "gpu"))


if __name__ == "__main__":
    sys.exit(main())

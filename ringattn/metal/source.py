"""The kernels' text: `.metal` files, and the switches that a variant sets in front of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent / "shaders"
LIBRARY = ("lanes", "segments")
PRODUCTS = ("stage", "products"), ("tensor",)  # by simdgroup matrices, and by the M5's matrix units
TENSOR_OPERATIONS = "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"


@cache
def body(kernel: str) -> str:
    """The body of `kernel`."""
    return (KERNELS / f"{kernel}.metal").read_text()


@cache
def header(switches: tuple[tuple[str, int], ...]) -> str:
    """What stands before a body: a switch decides which buffers a kernel has, which no template argument can."""
    tensor = dict(switches).get("TENSOR", 0)
    defines = "".join(f"#define RA_{name} {value}\n" for name, value in switches)
    text = defines + "".join(body(part) for part in LIBRARY + PRODUCTS[tensor])
    return TENSOR_OPERATIONS + text if tensor else text

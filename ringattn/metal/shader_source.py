"""Source of the kernels: `.metal` files, and the macros that select a variant."""

from __future__ import annotations

from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent / "shaders"
LIBRARY = ("lanes", "segments")
PRODUCTS = (("stage", "products"), ("tensor",))  # with simdgroup matrices, and with the M5's matrix units
TENSOR_OPERATIONS = "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"


@cache
def body(kernel: str) -> str:
    """Read the body of `kernel`."""
    return (KERNELS / f"{kernel}.metal").read_text()


@cache
def header(switches: tuple[tuple[str, int], ...]) -> str:
    """Build the text before a body: a macro for each switch, and the library.

    A switch decides which buffers a kernel has. No template argument can do that.
    """
    tensor = dict(switches).get("TENSOR", 0)
    defines = "".join(f"#define RA_{name} {value}\n" for name, value in switches)
    text = defines + "".join(body(part) for part in LIBRARY + PRODUCTS[tensor])
    return TENSOR_OPERATIONS + text if tensor else text

"""The kernels' text: `.metal` files, and the switches that a variant sets in front of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
LIBRARY = ("lanes", "stage", "segments", "products")


@cache
def body(kernel: str) -> str:
    """The body of `kernel`."""
    return (KERNELS / f"{kernel}.metal").read_text()


@cache
def header(switches: tuple[tuple[str, int], ...]) -> str:
    """What stands before a body: a switch decides which buffers a kernel has, which no template argument can."""
    defines = "".join(f"#define RA_{name} {value}\n" for name, value in switches)
    return defines + "".join(body(part) for part in LIBRARY)

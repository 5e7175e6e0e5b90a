"""The kernels' text: `.cu` files, and the constants and switches that a variant sets in front of them."""

from __future__ import annotations

import re
from functools import cache
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx

KERNELS = Path(__file__).parent / "kernels"
INCLUDE = re.compile(r'^#include "(\w+\.cuh?)"\n', re.MULTILINE)
TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.bool_: "bool", mx.int32: "int"}
Defines = tuple[tuple[str, int | str], ...]


@cache
def text(name: str) -> str:
    """The text of a file of `KERNELS`, with that of the files that it includes."""
    return INCLUDE.sub(lambda found: text(found[1]), (KERNELS / name).read_text())


@cache
def header(parts: tuple[str, ...], defines: Defines) -> str:
    """The text before a kernel's body: each of `defines` as a macro, then the files `parts`."""
    macros = "".join(f"#define RA_{name} {value}\n" for name, value in defines)
    return macros + "".join(text(f"{part}.cuh") for part in parts)


@cache
def name(kernel: str, before: str) -> str:
    """The name of a kernel with this header.

    MLX keeps compiled kernels by name, also on disk, so the name has a digest of the whole text.
    """
    digest = blake2b((before + text(f"{kernel}.cu")).encode(), digest_size=8).hexdigest()
    return f"ringattn_cuda_{kernel}_{digest}"

"""Kernels that find and fill memory on an NVIDIA GPU, and that MLX allocates memory for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

PACK = Path(__file__).with_name("pack.cu")


@lru_cache(maxsize=64)
def addresses_kernel(inputs: tuple[mx.Dtype, ...], outputs: tuple[mx.Dtype, ...]) -> Any:
    """A kernel that writes the addresses of its inputs, or where it has none, of its outputs."""
    read = [f"x{i}" for i in range(len(inputs))]
    made = [f"y{i}" for i in range(len(outputs))]
    located = enumerate(read or made)
    writes = "".join(f"  to[{i}] = reinterpret_cast<unsigned long long>({name});\n" for i, name in located)
    source = f"  auto* to = reinterpret_cast<volatile unsigned long long*>(box[0]);\n{writes}"
    return _kernel("addresses" if inputs else "buffers", inputs or outputs, ["box", *read], made, source)


def with_four_axes(x: mx.array, axis: int) -> mx.array:
    """View ``[B, H, L]`` or ``[B, L]`` as ``[B, H, L, D]``, with the tokens on `axis`."""
    import mlx.core as mx

    missing = [*range(1, 3 - axis), *range(x.ndim + 2 - axis, 4)]
    return mx.expand_dims(x, missing) if missing else x


@cache
def pack_kernel(dtypes: tuple[mx.Dtype, ...]) -> Any:
    """A kernel that packs arrays of these dtypes; see `Driver.pack`."""
    names = [f"x{i}" for i in range(len(dtypes))]
    source = "".join(f"  ringattn_pack({x}, {x}_shape, {x}_strides, y{i});\n" for i, x in enumerate(names))
    made = [f"y{i}" for i in range(len(dtypes))]
    return _kernel("pack", dtypes, names, made, source, PACK.read_text())


def _kernel(
    name: str, dtypes: Sequence[mx.Dtype], inputs: list[str], outputs: list[str], source: str, header: str = ""
) -> Any:
    """Build a kernel. MLX keeps compiled ones by name, also on disk, so the name has the dtypes and a digest."""
    import mlx.core as mx

    kinds = "_".join(str(dtype).rpartition(".")[2] for dtype in dtypes)
    digest = blake2b((header + source).encode(), digest_size=4).hexdigest()
    return mx.fast.cuda_kernel(
        name=f"ringattn_{name}_{kinds}_{digest}",
        input_names=inputs,
        output_names=outputs,
        source=source,
        header=header,
        ensure_row_contiguous=False,
    )

"""Work of the Metal forward kernel and of MLX's own kernel on the same arrays, counted on the host runtime."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.core.masks import Band
from ringattn.core.rules import ScoreRules
from ringattn.kernels.interface import KernelInputs, OutputSpec
from ringattn.metal import set_executor
from ringattn.metal.backend import MetalKernel
from ringattn.reporting.tables import format_row
from ringattn.verify.oracle import Case, check
from tools.hostmetal import Counters, Runtime
from tools.hostmetal.mlx_kernel import steel_attention

LENGTHS = {"512 x 512": (512, 512), "ragged": (301, 459)}
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BOUNDS = {"matmuls": 1.0, "exp2": 1.0, "barriers": 1.0, "device bytes": 1.02}


def work(counters: Counters) -> dict[str, int]:
    """Counts to compare."""
    moved = sum(counters.device_read.values()) + sum(counters.device_written.values())
    return {
        "matmuls": counters.matmuls,
        "exp2": counters.exp2,
        "barriers": counters.barriers,
        "device bytes": moved,
    }


def compare(lengths: tuple[int, int], dim: int, dtype: mx.Dtype, causal: bool) -> dict[str, float]:
    """Work of ringattn's kernel as a fraction of that of MLX's. Both answers are checked first."""
    q_len, k_len = lengths
    r = np.random.default_rng(dim)
    q, k, v = (
        mx.array(r.standard_normal((1, 1, n, dim)).astype(np.float32)).astype(dtype) for n in (q_len, k_len, k_len)
    )
    case = Case(q, k, v, np.arange(k_len - q_len, k_len), np.arange(k_len), {"mask": "causal" if causal else None})
    runtime = Runtime(checks=False)
    set_executor(runtime)
    try:
        check(case, *ra.attention(q, k, v, backend="metal", return_lse=True, **case.options))
        runtime.reset()
        rules = ScoreRules(dim**-0.5, Band.of(causal, None))
        inputs = KernelInputs(q, k, v, case.q_pos.astype(np.int32), case.k_pos.astype(np.int32), rules)
        MetalKernel().finish(inputs, OutputSpec(dtype, False))
        ours = work(runtime.counters)
        runtime.reset()
        out, _ = steel_attention(runtime, q, k, v, causal=causal, scale=dim**-0.5)
        check(case, out, mx.array(case.exact()[1].astype(np.float32)))
        theirs = work(runtime.counters)
    finally:
        set_executor(None)
    return {name: ours[name] / theirs[name] for name in BOUNDS}


def main() -> None:
    """Print the table. The last line has the largest value of each column."""
    print("work of the Metal forward kernel as a fraction of that of MLX's own, one head, lse off")
    _print_row("", list(BOUNDS))
    rows = []
    for name, lengths in LENGTHS.items():
        for dim in (64, 128, 256):
            for dtype in DTYPES:
                for causal in (False, True):
                    rows.append(compare(lengths, dim, dtype, causal))
                    short = str(dtype).removeprefix("mlx.core.")
                    label = f"{name}, head_dim {dim}, {short}, {'causal' if causal else 'full'}"
                    _print_row(label, [f"{x:.3f}" for x in rows[-1].values()])
    _print_row("largest (aim)", [f"{max(r[c] for r in rows):.3f} ({b:.2f})" for c, b in BOUNDS.items()])


def _print_row(label: str, cells: list[str]) -> None:
    print(format_row([label, *cells], [40, *(12 for _ in cells)], "<>"), flush=True)


if __name__ == "__main__":
    main()

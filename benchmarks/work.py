"""The work of the Metal forward kernel, counted on the host runtime next to MLX's own kernel on the same arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.core.masks import Band
from ringattn.core.rules import Rules
from ringattn.kernels.interface import KernelInputs, OutputSpec
from ringattn.metal import set_executor
from ringattn.metal.backend import MetalKernel
from ringattn.verify.oracle import Case, check
from tools.hostmetal import Counters, Runtime
from tools.hostmetal.mlx_kernel import steel_attention

LENGTHS = {"512 x 512": (512, 512), "ragged": (301, 459)}
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BOUNDS = {"matmuls": 1.0, "exp2": 1.0, "barriers": 1.0, "device bytes": 1.02}


def work(counters: Counters) -> dict[str, int]:
    """What is compared."""
    moved = sum(counters.device_read.values()) + sum(counters.device_written.values())
    return {
        "matmuls": counters.matmuls,
        "exp2": counters.exp2,
        "barriers": counters.barriers,
        "device bytes": moved,
    }


def compare(lengths: tuple[int, int], dim: int, dtype: mx.Dtype, causal: bool) -> dict[str, float]:
    """Ours as a fraction of MLX's; both answers are checked first."""
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
        rules = Rules(dim**-0.5, Band.of(causal, None))
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
    """Print the table; the last line has the largest of each column."""
    print("the Metal forward kernel's work as a fraction of MLX's own, one head, lse off")
    print(f"{'':<42}" + "".join(f"{name:>14}" for name in BOUNDS))
    rows = []
    for name, lengths in LENGTHS.items():
        for dim in (64, 128, 256):
            for dtype in DTYPES:
                for causal in (False, True):
                    rows.append(compare(lengths, dim, dtype, causal))
                    short = str(dtype).removeprefix("mlx.core.")
                    label = f"{name}, head_dim {dim}, {short}, {'causal' if causal else 'full'}"
                    print(f"{label:<42}" + "".join(f"{x:>14.3f}" for x in rows[-1].values()), flush=True)
    print(f"{'largest (aim)':<42}" + "".join(f"{max(r[c] for r in rows):>7.3f} ({b:.2f})" for c, b in BOUNDS.items()))


if __name__ == "__main__":
    main()

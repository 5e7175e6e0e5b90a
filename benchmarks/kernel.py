"""The CPU kernel against PyTorch's CPU scaled_dot_product_attention, same number of threads, float32."""

from __future__ import annotations

from itertools import product
from statistics import median

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.backends.blas import threads

from .common import medians, show


def main() -> None:
    """Time the grid."""
    import torch

    torch.set_num_threads(threads())
    mx.set_default_device(mx.cpu)
    rows, ratios = [], []
    for dim, tokens, causal, kv_heads in product((64, 128), (2048, 4096), (False, True), (2, 8)):
        seconds = _one(torch, dim, tokens, causal, kv_heads)
        ours, best = seconds.pop("ringattn"), min(seconds.values())
        ratios.append(best / ours)
        rows.append([dim, tokens, "yes" if causal else "no", f"8/{kv_heads}", f"{ours * 1e3:.0f}", f"{best * 1e3:.0f}",
                     f"{ratios[-1]:.2f}"])  # fmt: skip
    head = ["head_dim", "tokens", "causal", "heads", "ringattn ms", "torch ms", "torch / ringattn"]
    show(f"CPU kernel against torch {torch.__version__}, {threads()} threads", head, rows)
    print(f"  median ratio {median(ratios):.2f} (aim: at least 1.00)")


def _one(torch, dim: int, tokens: int, causal: bool, kv_heads: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, heads, tokens, dim), np.float32) for heads in (8, kv_heads, kv_heads))
    tq, tk, tv = map(torch.from_numpy, (q, k, v))
    mq, mk, mv = map(mx.array, (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(8 // kv_heads, 1) for x in (tk, tv))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ours() -> mx.array:
        out = ra.attention(mq, mk, mv, mask="causal" if causal else None)
        mx.eval(out)
        return out

    calls = {"ringattn": ours, "expanded": lambda: sdpa(tq, wide_k, wide_v, is_causal=causal)}
    if kv_heads != 8:
        calls["grouped"] = lambda: sdpa(tq, tk, tv, is_causal=causal, enable_gqa=True)
    difference = np.abs(np.array(ours()) - calls["expanded"]().numpy()).max()
    assert difference < 1e-5, difference
    return medians(calls, repeats=9, pause=0.1)


if __name__ == "__main__":
    main()

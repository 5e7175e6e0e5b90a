"""Time of the CPU kernel against PyTorch's scaled_dot_product_attention, with the same number of threads, float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.native.blas import threads

from .common import medians, show


def main() -> None:
    """Time the forward pass alone and with its gradient, for all shapes."""
    import torch

    torch.set_num_threads(threads())
    mx.set_default_device(mx.cpu)
    for title, calls in (("CPU kernel", _forward), ("CPU kernel and its gradient", _both)):
        rows = []
        ratios = []
        for dim, tokens, causal, kv_heads in product((64, 128), (2048, 4096), (False, True), (2, 8)):
            seconds = _one(torch, calls, dim, tokens, causal, kv_heads)
            ours = seconds.pop("ringattn")
            best = min(seconds.values())
            ratios.append(best / ours)
            times = [f"{ours * 1e3:.0f}", f"{best * 1e3:.0f}", f"{ratios[-1]:.2f}"]
            rows.append([dim, tokens, "yes" if causal else "no", f"8/{kv_heads}", *times])
        head = ["head_dim", "tokens", "causal", "heads", "ringattn ms", "torch ms", "torch / ringattn"]
        show(f"{title} against torch {torch.__version__}, {threads()} threads", head, rows)
        print(f"  median ratio {median(ratios):.2f} (aim: at least 1.00)")


def _one(torch, calls: Callable, dim: int, tokens: int, causal: bool, kv_heads: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, heads, tokens, dim), np.float32) for heads in (8, kv_heads, kv_heads))
    torch_attends = torch.nn.functional.scaled_dot_product_attention
    wide = (x.repeat_interleave(8 // kv_heads, 1) for x in map(torch.from_numpy, (k, v)))
    ours = partial(ra.attention, mask="causal" if causal else None)
    timed = {
        "ringattn": calls(mx, ours, *map(mx.array, (q, k, v))),
        "expanded": calls(torch, partial(torch_attends, is_causal=causal), torch.from_numpy(q), *wide),
    }
    if kv_heads != 8:
        grouped = partial(torch_attends, is_causal=causal, enable_gqa=True)
        timed["grouped"] = calls(torch, grouped, *map(torch.from_numpy, (q, k, v)))
    result = np.array(timed["ringattn"]())
    expected = timed["grouped" if kv_heads != 8 else "expanded"]().numpy()
    assert np.abs(result - expected).max() < 1e-5 * max(1, np.abs(expected).max()), "ringattn and torch differ"
    return medians(timed, repeats=9 if calls is _forward else 5, pause=0.1)


def _forward(library, attend: Callable, q, k, v) -> Callable:
    def run():
        out = attend(q, k, v)
        if library is mx:
            mx.eval(out)
        return out

    return run


def _both(library, attend: Callable, q, k, v) -> Callable:
    """Gradient by k of a loss whose gradient by `out` is q, with the forward pass."""
    if library is mx:
        loss = mx.grad(lambda q, k, v: (attend(q, k, v) * mx.stop_gradient(q)).sum(), argnums=(0, 1, 2))

        def run():
            gradients = loss(q, k, v)
            mx.eval(gradients)
            return gradients[1]
    else:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

        def run():
            return library.autograd.grad(attend(*leaves), leaves, q)[1]

    return run


if __name__ == "__main__":
    main()

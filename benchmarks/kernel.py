"""Speed of the CPU kernel: against PyTorch, the machine's matrix products, other dtypes, and a copy of the cache.

Calls that are compared take turns, and the shortest time of each counts: other work on the machine only adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.bench.timing import turns
from ringattn.cpu.flash import instruction_sets
from ringattn.cpu.work_units import run_on_threads
from ringattn.native.blas import threads

from .common import show

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SHAPES = tuple(product((64, 128), (2048, 4096), (False, True), (2, 8)))  # head_dim, tokens, causal, key/value heads
CACHE = 32 * 1024  # tokens
SIZE = 1536  # rows and columns of large products


def main() -> None:
    """Time the forward pass, the gradient, dtypes and decoding."""
    import torch

    torch.set_num_threads(threads())
    mx.set_default_device(mx.cpu)
    print(f"torch {torch.__version__}, {threads()} threads, kernel: {(instruction_sets() or ['NumPy'])[-1]}")
    _against_torch(torch, "Forward", _forward, products=2)
    _against_torch(torch, "Forward and gradient", _both, products=7)
    _dtypes()
    _decode()


def _against_torch(torch, title: str, calls: Callable, products: int) -> None:
    """Time all shapes. A pass has `products` matrix products as large as the scores."""
    rows = []
    ratios = []
    for shape in SHAPES:
        dim, tokens, causal, kv_heads = shape
        seconds = _one(torch, calls, *shape)
        ours = seconds.pop("ringattn")
        peak = threads() * 2 * SIZE**3 / seconds.pop("sgemm")
        ratios.append(min(seconds.values()) / ours)
        flops = products * 2 * 8 * tokens**2 * dim / (2 if causal else 1)
        fraction = flops / ours / peak
        times = [f"{ours * 1e3:.0f}", f"{min(seconds.values()) * 1e3:.0f}", f"{ratios[-1]:.2f}", f"{fraction:.2f}"]
        rows.append([dim, tokens, "yes" if causal else "no", f"8/{kv_heads}", *times])
    head = ["head_dim", "tokens", "causal", "heads", "ringattn ms", "torch ms", "torch / ringattn", "of sgemm"]
    show(f"{title}, float32", head, rows)
    print(f"  torch / ringattn: median {median(ratios):.2f}, least {min(ratios):.2f}")


def _sgemm() -> Callable:
    """Large float32 products of NumPy, one on each thread."""
    x, y = (np.ones((SIZE, SIZE), np.float32) for _ in range(2))
    results = [np.empty_like(x) for _ in range(threads())]
    return partial(run_on_threads, lambda out: np.matmul(x, y, out=out), results)


def best(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Shortest seconds of each call; they take turns."""
    return {name: min(times) for name, times in turns(calls, repeats, pause=0.05).items()}


def _one(torch, calls: Callable, dim: int, tokens: int, causal: bool, kv_heads: int) -> dict[str, float]:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, heads, tokens, dim), np.float32) for heads in (8, kv_heads, kv_heads))
    torch_attends = torch.nn.functional.scaled_dot_product_attention
    wide = (x.repeat_interleave(8 // kv_heads, 1) for x in map(torch.from_numpy, (k, v)))
    ours = partial(ra.attention, mask="causal" if causal else None)
    timed = {
        "sgemm": _sgemm(),
        "ringattn": calls(mx, ours, *map(mx.array, (q, k, v))),
        "expanded": calls(torch, partial(torch_attends, is_causal=causal), torch.from_numpy(q), *wide),
    }
    if kv_heads != 8:
        grouped = partial(torch_attends, is_causal=causal, enable_gqa=True)
        timed["grouped"] = calls(torch, grouped, *map(torch.from_numpy, (q, k, v)))
    result = np.array(timed["ringattn"]())
    expected = timed["grouped" if kv_heads != 8 else "expanded"]().numpy()
    assert np.abs(result - expected).max() < 1e-5 * max(1, np.abs(expected).max()), "ringattn and torch differ"
    return best(timed, repeats=9 if calls is _forward else 5)


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


def _arrays(dtype: mx.Dtype, tokens: int, dim: int, heads: int, kv_heads: int, q_len: int) -> list[mx.array]:
    random = np.random.default_rng(0)
    shapes = (heads, q_len), (kv_heads, tokens), (kv_heads, tokens)
    arrays = [mx.array(random.standard_normal((1, *shape, dim), np.float32)).astype(dtype) for shape in shapes]
    mx.eval(arrays)
    return arrays


def _dtypes() -> None:
    """Compare the forward pass in 16-bit dtypes with float32."""
    rows = []
    for dim, causal in product((64, 128), (False, True)):
        attend = partial(ra.attention, mask="causal" if causal else None)
        calls = {str(dtype): _forward(mx, attend, *_arrays(dtype, 2048, dim, 8, 2, 2048)) for dtype in DTYPES}
        seconds = best(calls, repeats=9)
        full = seconds[str(mx.float32)]
        times = [f"{full * 1e3:.0f}", *(f"{full / seconds[str(dtype)]:.2f}" for dtype in DTYPES[1:])]
        rows.append([dim, "yes" if causal else "no", *times])
    head = ["head_dim", "causal", "float32 ms", "float32 / float16", "float32 / bfloat16"]
    show("Dtypes, 2048 tokens, heads 8/2", head, rows)


def _decode() -> None:
    """Compare one token against a long cache with a plain copy of the cache, on all threads."""
    rows = []
    for dtype in DTYPES:
        q, k, v = _arrays(dtype, CACHE, 128, 32, 8, 1)
        caches = [np.array(x.view(mx.uint16) if dtype == mx.bfloat16 else x, copy=False) for x in (k, v)]
        heads = [(cache[:, i], np.empty_like(cache[:, i])) for cache in caches for i in range(8)]
        copy = partial(run_on_threads, lambda pair: np.copyto(pair[1], pair[0]), heads)
        seconds = best({"ringattn": _forward(mx, ra.attention, q, k, v), "copy": copy}, repeats=15)
        rates = {name: k.nbytes * 2 / x / 1e9 for name, x in seconds.items()}
        ratio = rates["ringattn"] / rates["copy"]
        rows.append([str(dtype).split(".")[-1], *(f"{x:.1f}" for x in rates.values()), f"{ratio:.2f}"])
    head = ["dtype", "ringattn GB/s of the cache", "copy GB/s of the cache", "ringattn / copy"]
    show(f"Decoding one token, heads 32/8 of 128, {CACHE} keys", head, rows)


if __name__ == "__main__":
    main()

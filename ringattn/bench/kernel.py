"""Timing of the fused kernel against MLX's own attention on the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx

from ..attention import attention
from ..reporting.one_line import in_one_line
from .problem import AttentionShape, distance, random_arrays, sampled_error
from .records import Record
from .timing import turns

KEYS = ("head_dim", "tokens", "heads", "dtype", "mask", "what")
FIGURES = ("mlx_s", "mlx_ratio", "tflops", "error")
SAMPLE = 0.02  # s of a sample at least
MOST_CALLS = 50  # in a sample
PAUSE = 0.02  # s before each sample


def measure(shape: AttentionShape, what: str, backend: str | None, repeats: int) -> Record:
    """Check the answer of `ringattn.attention`, then time the call. A wrong answer is not timed.

    Args:
        shape: Problem to time.
        what: Name of the call.
        backend: Argument of `ringattn.attention`.
        repeats: Number of samples. A sample has several calls if one call is too short.
    """
    case = {**shape.case, "what": what, "backend": backend or "default"}
    try:
        return _measure(shape, case, backend, repeats)
    except (RuntimeError, ValueError) as error:  # of a kernel, or for lack of memory: the next shape may work
        return Record("kernel", case, problem=in_one_line(error))


def _measure(shape: AttentionShape, case: dict, backend: str | None, repeats: int) -> Record:
    arrays = random_arrays(shape)

    def ours() -> Any:
        return attention(*arrays, mask=shape.mask, backend=backend, return_lse=shape.lse)

    def theirs() -> mx.array:
        return mx.fast.scaled_dot_product_attention(*arrays, scale=shape.head_dim**-0.5, mask=shape.mask)

    out, lse = ours() if shape.lse else (ours(), None)
    error = max(
        sampled_error(shape, arrays, shape.positions, out, lse),
        distance(shape, arrays, shape.positions, out, theirs()),
    )
    if not error <= 1:
        return Record("kernel", case, problem=f"{error:.3g} of the allowed error")
    once = turns({"ours": _burst(ours, 1), "mlx": _burst(theirs, 1)}, 1)
    count = max(1, min(MOST_CALLS, int(SAMPLE / min(seconds for seconds, *_ in once.values()))))
    found = turns({"ours": _burst(ours, count), "mlx": _burst(theirs, count)}, repeats, pause=PAUSE)
    seconds = [sample / count for sample in found["ours"]]
    mlx_s = median(found["mlx"]) / count
    middle = median(seconds)
    figures = {"mlx_s": mlx_s, "mlx_ratio": mlx_s / middle, "tflops": shape.flops / middle / 1e12, "error": error}
    return Record("kernel", case, seconds, figures)


def _burst(call: Callable[[], Any], count: int) -> Callable[[], None]:
    """Join `count` independent calls into one evaluation, since waiting for the GPU takes longer than a small call."""
    return lambda: mx.eval([call() for _ in range(count)])

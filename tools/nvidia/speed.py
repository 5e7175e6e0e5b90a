"""Time the CUDA kernels beside MLX's own attention and PyTorch's FLASH backend, in one process, answers checked first.

Run ``python -m tools.nvidia.speed``. PyTorch's column is empty where it is not installed.
"""

from __future__ import annotations

import os

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX is imported: float32 products in float32

import importlib.util
from collections.abc import Callable

import click
import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn import backends
from ringattn.bench.problem import AttentionShape, random_arrays, sampled_error
from ringattn.bench.timing import medians
from ringattn.core.masks import Band
from ringattn.core.rules import ScoreRules
from ringattn.kernels.interface import KernelInputs

REPEATS = 5
SAMPLE = 0.03  # seconds of what is timed at once
DECODE_KEYS = (16_384, 131_072)
FORWARD = [
    AttentionShape(dtype, dim, (16, 4), tokens, tokens, causal, lse=True)
    for dtype in (mx.bfloat16, mx.float16)
    for dim in (128, 64)
    for causal in (False, True)
    for tokens in ((4096, 16_384, 65_536) if dtype == mx.bfloat16 else (16_384,))
]
OTHERS = [
    AttentionShape(mx.bfloat16, 256, (16, 4), 16_384, 16_384, True, lse=True),
    AttentionShape(mx.bfloat16, 80, (16, 4), 16_384, 16_384, True, lse=True),
    AttentionShape(mx.float32, 128, (16, 4), 8192, 8192, True, lse=True),
    AttentionShape(mx.float32, 64, (16, 4), 8192, 8192, False, lse=True),
]


BACKWARD = [
    AttentionShape(dtype, dim, (16, 4), tokens, tokens, causal, lse=True)
    for dtype in (mx.bfloat16, mx.float16)
    for dim in (128, 64)
    for causal in (False, True)
    for tokens in ((4096, 8192, 16_384, 32_768) if dtype == mx.bfloat16 else (16_384,))
]
OTHER_BACKWARD = [
    AttentionShape(mx.bfloat16, 256, (16, 4), 8192, 8192, True, lse=True),
    AttentionShape(mx.bfloat16, 80, (16, 4), 8192, 8192, True, lse=True),
    AttentionShape(mx.float32, 128, (16, 4), 4096, 4096, True, lse=True),
    AttentionShape(mx.float32, 64, (16, 4), 4096, 4096, False, lse=True),
]
CLOSE = 0.03  # of the largest gradient: `tools.nvidia.check` measures errors, this finds wrong results


def words(shape: AttentionShape) -> str:
    """A shape in words."""
    name = str(shape.dtype).removeprefix("mlx.core.")
    mask = "causal" if shape.causal else "full"
    return f"{name}, head_dim {shape.head_dim}, {shape.queries} x {shape.keys}, {mask}"


def torch_flash(shape: AttentionShape, gradient: bool = False) -> Callable[[], float] | None:
    """A function that returns the seconds of one call of PyTorch's FLASH backend, where it takes such a problem.

    With `gradient` that of its backward pass alone.
    """
    if importlib.util.find_spec("torch") is None or shape.dtype == mx.float32:
        return None
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = torch.bfloat16 if shape.dtype == mx.bfloat16 else torch.float16
    (heads, kv_heads), dim = shape.heads, shape.head_dim
    q = torch.randn(1, heads, shape.queries, dim, dtype=dtype, device="cuda")
    k, v = (torch.randn(1, kv_heads, shape.keys, dim, dtype=dtype, device="cuda") for _ in "kv")

    def call() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=True)

    def seconds() -> float:
        if not gradient:
            return _median_of(call, torch.cuda.synchronize)
        for x in (q, k, v):
            x.requires_grad_(True)
        out = call()
        dout = torch.randn_like(out)
        backward = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: E731
        return _median_of(backward, torch.cuda.synchronize)

    return seconds


def _median_of(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """The median seconds of a call; several are timed together."""

    def burst(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                call()
            wait()

        return run

    burst(2)()
    once = medians({"": burst(3)}, 1)[""] / 3
    count = max(1, min(200, int(SAMPLE / once)))
    return medians({"": burst(count)}, REPEATS)[""] / count


def attend(shape: AttentionShape) -> Callable[..., tuple[mx.array, mx.array]]:
    """Our attention with the lse, compiled: without the time that Python takes for a call."""
    mask = "causal" if shape.causal else None
    return mx.compile(lambda q, k, v: ra.attention(q, k, v, mask=mask, backend="cuda", return_lse=True))


def per_call(call: Callable[[], object]) -> float:
    """The median seconds of a call, of which several are evaluated together."""

    def burst(count: int) -> Callable[[], None]:
        return lambda: mx.eval([call() for _ in range(count)])

    burst(2)()
    once = medians({"": burst(3)}, 1)[""] / 3
    count = max(1, min(50, int(SAMPLE / once)))
    return medians({"": burst(count)}, REPEATS)[""] / count


def forward(shape: AttentionShape) -> bool:
    """One line: milliseconds and TFLOP/s of all three, and ours as a fraction of theirs."""
    q, k, v = random_arrays(shape)
    ours, mask = attend(shape), "causal" if shape.causal else None
    error = sampled_error(shape, (q, k, v), shape.positions, *ours(q, k, v))
    flash = torch_flash(shape)
    seconds = [
        per_call(lambda: ours(q, k, v)),
        per_call(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5, mask=mask)),
        flash() if flash else float("nan"),
    ]
    rates = [shape.flops / one / 1e12 for one in seconds]
    click.echo(
        f"{words(shape):<46}{1e3 * seconds[0]:>9.3f} ms {rates[0]:>7.0f}{rates[1]:>7.0f}{rates[2]:>7.0f} TFLOP/s"
        f"{rates[0] / rates[1]:>7.2f}{rates[0] / rates[2]:>7.2f}{error:>8.2f}"
    )
    return error <= 1


def backward(shape: AttentionShape) -> bool:
    """One line: the backward pass alone from saved results, beside PyTorch's; forward and backward, beside MLX's."""
    q, k, v = random_arrays(shape)
    dout = mx.random.normal(q.shape, key=mx.random.key(9)).astype(q.dtype)
    out, lse = attend(shape)(q, k, v)
    ours, whole = _gradient(shape), _whole_gradient(attend(shape))
    mask = "causal" if shape.causal else None
    theirs = _whole_gradient(
        lambda q, k, v: (mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5, mask=mask),)
    )
    flash = torch_flash(shape, gradient=True)
    error = max(map(_difference, ours(q, k, v, out, lse, dout), theirs(q, k, v, dout)))
    seconds = [
        per_call(lambda: ours(q, k, v, out, lse, dout)),
        flash() if flash else float("nan"),
        per_call(lambda: whole(q, k, v, dout)),
        per_call(lambda: theirs(q, k, v, dout)),
    ]
    rates = [2.5 * shape.flops / one / 1e12 for one in seconds[:2]]
    click.echo(
        f"{words(shape):<46}{1e3 * seconds[0]:>9.3f} ms {rates[0]:>7.0f}{rates[1]:>7.0f} TFLOP/s"
        f"{rates[0] / rates[1]:>8.2f}{1e3 * seconds[2]:>10.3f}{1e3 * seconds[3]:>9.3f} ms{error:>9.4f}"
    )
    return error <= CLOSE


def _difference(x: mx.array, y: mx.array) -> float:
    x, y = x.astype(mx.float32), y.astype(mx.float32)
    return (mx.abs(x - y).max() / mx.abs(y).max()).item()


def _gradient(shape: AttentionShape) -> Callable[..., list[mx.array]]:
    """Our backward pass from saved results, compiled."""
    kernel = backends.select("cuda")
    q_pos, k_pos = (np.arange(n, dtype=np.int32) for n in (shape.queries, shape.keys))
    rules = ScoreRules(shape.head_dim**-0.5, Band.of(shape.causal, None))

    def run(q, k, v, out, lse, dout):
        rows = kernel.rows(out, lse, dout, mx.zeros_like(lse))
        inputs = KernelInputs(q, k, v, q_pos, k_pos, rules)
        found = kernel.gradients(inputs, rows)
        return [x.astype(q.dtype) for x in found[:3]]

    return mx.compile(run)


def _whole_gradient(attend: Callable[..., tuple[mx.array, ...]]) -> Callable[..., list[mx.array]]:
    """Forward and backward, compiled."""
    return mx.compile(lambda q, k, v, dout: mx.vjp(lambda *x: attend(*x)[0], [q, k, v], [dout])[1])


def decode(keys: int, bandwidth: float) -> bool:
    """One line: one query against a long cache; the bytes of K and V a second, as a fraction of a copy's."""
    shape = AttentionShape(mx.bfloat16, 128, (32, 8), 1, keys, False, lse=True)
    q, k, v = random_arrays(shape)
    error = sampled_error(shape, (q, k, v), shape.positions, *ra.attention(q, k, v, backend="cuda", return_lse=True))

    ours = attend(shape)
    seconds = per_call(lambda: ours(q, k, v))
    whole = per_call(lambda: ra.attention(q, k, v, backend="cuda", return_lse=True))
    theirs = per_call(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5))
    rates = [(k.nbytes + v.nbytes) / one for one in (seconds, theirs)]
    click.echo(
        f"decode, {words(shape):<38}{1e3 * seconds:>9.3f} ms (a call {1e3 * whole:.3f}) "
        f"{rates[0] / 1e12:.2f} and {rates[1] / 1e12:.2f} TB/s: "
        f"{rates[0] / rates[1]:.2f} of mlx, {rates[0] / bandwidth:.2f} of a copy's {bandwidth / 1e12:.2f}{error:>8.2f}"
    )
    return error <= 1


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a pass over 2 GiB."""
    x = mx.zeros((1 << 29,), mx.float32)
    mx.eval(x)
    seconds = _median_of(lambda: mx.eval([x + 1 for _ in range(4)]), lambda: None) / 4
    return 2 * x.nbytes / seconds


def window(size: int, tokens: int = 65_536) -> None:
    """One line: what a window leaves of the time of a causal mask, beside what it leaves of the pairs."""
    pairs = (tokens * size - size * (size - 1) / 2) / (tokens * (tokens + 1) / 2)
    _part_of_causal(f"window {size} of {tokens} tokens", tokens, {"window": size}, pairs)


def segments(count: int, tokens: int = 65_536) -> None:
    """One line: the same for documents of equal length, each causal."""
    ids = mx.repeat(mx.arange(count, dtype=mx.int32), tokens // count)[None]
    length = tokens // count
    pairs = count * length * (length + 1) / (tokens * (tokens + 1))
    _part_of_causal(f"{count} documents in {tokens} tokens", tokens, {"mask": "causal", "segments": (ids, ids)}, pairs)


def _part_of_causal(what: str, tokens: int, options: dict, pairs: float) -> None:
    arrays = random_arrays(AttentionShape(mx.bfloat16, 128, (16, 4), tokens, tokens, True))

    def attend(options: dict) -> Callable[..., mx.array]:
        return lambda q, k, v: ra.attention(q, k, v, backend="cuda", **options)

    def gradient(options: dict) -> Callable[..., list[mx.array]]:
        return lambda q, k, v: mx.vjp(attend(options), [q, k, v], [q])[1]

    for name, make in (("forward", attend), ("forward and backward", gradient)):
        compiled = [mx.compile(make(o)) for o in ({"mask": "causal"}, options)]
        causal, narrow = (per_call(lambda f=f: f(*arrays)) for f in compiled)
        click.echo(
            f"{what}, {name}: {1e3 * narrow:.3f} ms, {narrow / causal:.3f} of causal's time, {pairs:.3f} of its pairs"
        )


def time_forward() -> bool:
    columns = f"{'ours':>20}{'mlx':>7}{'flash':>7}{'':>8}{'/ mlx':>7}{'/ flash':>7}{'error':>8}"
    click.echo(f"{'16/4 heads, out and lse':<46}{columns}")
    return sum(not forward(shape) for shape in FORWARD + OTHERS) == 0


def time_backward() -> bool:
    columns = f"{'ours':>20}{'flash':>7}{'':>8}{'/ flash':>8}{'ours':>10}{'mlx':>9}{'':>3}{'other':>9}"
    click.echo(f"{'16/4 heads, backward; forward and backward':<46}{columns}")
    return sum(not backward(shape) for shape in BACKWARD + OTHER_BACKWARD) == 0


def time_decode() -> bool:
    bandwidth = copy_bandwidth()
    return sum(not decode(keys, bandwidth) for keys in DECODE_KEYS) == 0


def time_masks() -> bool:
    window(1024)
    segments(16)
    return True


PARTS = {"forward": time_forward, "backward": time_backward, "decode": time_decode, "masks": time_masks}


@click.command(help=__doc__)
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
def main(parts: tuple[str, ...]) -> None:
    mx.set_default_device(mx.gpu)
    info = mx.device_info(mx.gpu)
    click.echo(f"{info.get('device_name')}, mlx {mx.__version__}")
    right = [PARTS[part]() for part in parts or PARTS]
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()

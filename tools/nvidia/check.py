"""Run the Metal kernels on an NVIDIA GPU and check what they give: ``python -m tools.nvidia.check``.

Needs MLX with its CUDA back-end. The kernels' source is the one that a Mac compiles, with Metal's words spelled in CUDA
(``words.cuh``); matrices of a simdgroup are multiplied by shuffles, so that times say nothing about a Mac.
"""

from __future__ import annotations

import os

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX is imported: float32 products in float32

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.bench.kernel import Shape, random_arrays, sampled_error
from ringattn.bench.timing import medians
from ringattn.metal import set_executor
from ringattn.verify.variants import verify_variants

from .executor import cuda_executor, groups

LARGE = [
    Shape(mx.bfloat16, 128, (8, 2), 65_536, 65_536, True),
    Shape(mx.float16, 64, (8, 8), 32_768, 32_768, False),
    Shape(mx.float32, 256, (4, 2), 16_384, 16_384, True),
    Shape(mx.bfloat16, 128, (32, 8), 1, 262_144, False),
    Shape(mx.float16, 128, (8, 2), 8, 1_048_576, True),
]
SMALL = [Shape(mx.bfloat16, 128, (4, 2), 2048, 2048, True), Shape(mx.float16, 64, (4, 2), 3, 40_000, True)]
GRADIENT = Shape(mx.bfloat16, 128, (16, 4), 8192, 8192, True)
SMALL_GRADIENT = Shape(mx.bfloat16, 64, (4, 2), 1024, 1024, True)

failed: list[str] = []
threadgroups = [0, 0]  # calls, and their threadgroups


def counted(call):
    """The executor, which counts."""
    x, y, z = groups(call)
    threadgroups[0] += 1
    threadgroups[1] += x * y * z
    return cuda_executor(call)


def report(name: str, right: bool, what: str) -> None:
    """One line, and what failed for the end."""
    click.echo(f"{'ok  ' if right else 'FAIL'}  {name:<58} {what}")
    if not right:
        failed.append(name)


def timed(run: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check_variants() -> None:
    """Every variant and feature, forward and gradient, whole against float64."""
    for name, found in verify_variants().items():
        right = not isinstance(found, str) and found <= 1
        report(name, right, found if isinstance(found, str) else f"{found:.2f} of the budget")


def words(shape: Shape) -> str:
    """A shape in words."""
    name = str(shape.dtype).removeprefix("mlx.core.")
    heads = "{}/{}".format(*shape.heads)
    mask = "causal" if shape.causal else "full"
    return f"{name}, {heads} heads x {shape.head_dim}, {shape.queries} x {shape.keys}, {mask}"


def check_large(shape: Shape) -> None:
    """Sampled rows against float64, and the same bits five times."""
    q, k, v = random_arrays(shape)
    mask = "causal" if shape.causal else None
    before = list(threadgroups)

    def attend() -> list[mx.array]:
        results = list(ra.attention(q, k, v, mask=mask, backend="metal", return_lse=True))
        mx.eval(results)
        return results

    first = attend()
    calls, many = (now - was for now, was in zip(threadgroups, before))
    seconds = timed(attend)
    error = sampled_error(shape, q, k, v, *first)
    same = all(mx.array_equal(a, b).item() for _ in range(4) for a, b in zip(first, attend()))
    what = f"{error:.2f} of the budget, {calls} calls, {many} threadgroups, {seconds:.2f} s"
    report(words(shape), error <= 1 and same, what + ("" if same else ", OTHER BITS AGAIN"))


def check_gradient(shape: Shape) -> None:
    """Against MLX's own gradient of its attention in float32, which is timed in the kernels' dtype too."""
    arrays = random_arrays(shape)
    weights = mx.random.normal((1, shape.heads[0], shape.queries, shape.head_dim), key=mx.random.key(9))
    mask = "causal" if shape.causal else None

    def gradient(attend: Callable[..., mx.array], *inputs: mx.array) -> list[mx.array]:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (attend(q, k, v).astype(mx.float32) * weights).sum()

        found = mx.grad(loss, argnums=(0, 1, 2))(*inputs)
        mx.eval(found)
        return list(found)

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return ra.attention(q, k, v, mask=mask, backend="metal")

    def theirs(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5, mask=mask)

    exact = gradient(theirs, *(x.astype(mx.float32) for x in arrays))
    errors = {}
    for name, attend in (("ours", ours), ("mlx", theirs)):
        found = gradient(attend, *arrays)
        errors[name] = max(
            (mx.abs(x.astype(mx.float32) - y).max() / mx.abs(y).max()).item() for x, y in zip(found, exact)
        )
    seconds = medians({"ours": lambda: gradient(ours, *arrays), "mlx": lambda: gradient(theirs, *arrays)}, 3)
    right = np.isfinite(errors["ours"]) and errors["ours"] <= 2 * errors["mlx"]
    what = " ".join(f"{name}: error {errors[name]:.1e}, {seconds[name]:.3f} s;" for name in errors)
    report(f"gradient, {words(shape)}", right, what)


def sanitize() -> None:
    """This program again, small, under the memory and the race checker."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        click.echo("compute-sanitizer: not found on PATH or in /usr/local/cuda/bin; nothing was checked with it")
        return
    for checker in ("memcheck", "racecheck"):
        line = [tool, "--tool", checker, "--error-exitcode", "9", sys.executable, "-m", "tools.nvidia.check", "--quick"]
        done = subprocess.run(line, capture_output=True, text=True)
        told = [text for text in done.stdout.splitlines() if "SUMMARY" in text]
        report(f"compute-sanitizer {checker}", done.returncode == 0, " ".join(told) or done.stderr[-300:])


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Small problems only.")
@click.option("--sanitizer", is_flag=True, help="Small problems under compute-sanitizer.")
def main(quick: bool, sanitizer: bool) -> None:
    if not mx.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU that MLX can use: pip install 'mlx[cuda13]'")
    if sanitizer:
        sanitize()
    else:
        mx.set_default_device(mx.gpu)
        set_executor(counted)
        if not quick:
            check_variants()
        for shape in SMALL if quick else SMALL + LARGE:
            check_large(shape)
        check_gradient(SMALL_GRADIENT if quick else GRADIENT)
        click.echo(f"{threadgroups[0]} calls, {threadgroups[1]} threadgroups")
    click.echo(f"FAILED: {'; '.join(failed)}" if failed else "all checks passed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

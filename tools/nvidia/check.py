"""Check the CUDA kernels on an NVIDIA GPU: ``python -m tools.nvidia.check``.

This needs MLX with its CUDA backend. ``--kernels metal`` checks the Metal kernels instead: the source that a Mac
compiles, with Metal's names defined in CUDA (``words.cuh``). Shuffles then multiply the matrices of a simdgroup, so
that times say nothing about a Mac.
"""

from __future__ import annotations

import os

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX is imported: float32 products in float32

import time
from collections.abc import Callable
from functools import partial

import click
import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.bench.problem import AttentionShape, random_arrays, sampled_error
from ringattn.bench.timing import medians
from ringattn.metal import set_executor
from ringattn.verify.features import FEATURES, in_dtype
from ringattn.verify.findings import Check, run_check
from ringattn.verify.oracle import FLOATS, Case, GradientCase, random_case, ratios
from ringattn.verify.variants import attention_gradients, variants

from .executor import cuda_executor, groups

CUT = AttentionShape(mx.bfloat16, 128, (8, 8), 2304, 8192, False)  # a last wave whose keys are cut, on an H100
LARGE = [
    AttentionShape(mx.bfloat16, 128, (8, 2), 65_536, 65_536, True),
    AttentionShape(mx.float16, 64, (8, 8), 32_768, 32_768, False),
    CUT,
    AttentionShape(mx.float16, 64, (9, 3), 2048, 8192, False),
    AttentionShape(mx.float32, 256, (4, 2), 16_384, 16_384, True),
    AttentionShape(mx.bfloat16, 128, (32, 8), 1, 262_144, False),
    AttentionShape(mx.float16, 128, (8, 2), 8, 1_048_576, True),
]
SMALL = [
    AttentionShape(mx.bfloat16, 128, (4, 2), 300, 300, True),
    AttentionShape(mx.float16, 64, (4, 2), 3, 3000, True),
    AttentionShape(mx.float32, 256, (2, 1), 70, 90, True),
]
GRADIENTS = [
    AttentionShape(mx.bfloat16, 128, (16, 4), 8192, 8192, True),
    AttentionShape(mx.bfloat16, 128, (16, 4), 3001, 3001, False),
    AttentionShape(mx.float16, 64, (8, 2), 4096, 8192, True),
    AttentionShape(mx.bfloat16, 256, (4, 2), 2048, 2048, True),
    AttentionShape(mx.float32, 128, (8, 2), 2048, 2048, True),
]
SMALL_GRADIENTS = [
    AttentionShape(mx.bfloat16, 64, (4, 2), 200, 200, True),
    AttentionShape(mx.bfloat16, 128, (2, 1), 200, 300, True),
    AttentionShape(mx.float16, 192, (2, 1), 100, 100, False),
    AttentionShape(mx.float32, 80, (2, 1), 70, 90, True),
]

RANDOM = 200  # problems with a random choice of every feature
RANDOM_GRADIENTS = 40
STEP = 5  # of them in one check

Checks = list[Callable[[], None]]

kernels = "cuda"
failed: list[str] = []
threadgroups = [0, 0]  # calls, and their threadgroups


def counted(call):
    """Run a call and count it and its threadgroups."""
    x, y, z = groups(call)
    threadgroups[0] += 1
    threadgroups[1] += x * y * z
    return cuda_executor(call)


def report(name: str, right: bool, what: str) -> None:
    """Print one line, and keep failures for the end."""
    print(f"{'ok  ' if right else 'FAIL'}  {name:<58} {what}", flush=True)
    if not right:
        failed.append(name)


def timed(run: Callable[[], None]) -> float:
    """Measure the seconds of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check_variant(name: str, check: Check) -> None:
    """Compare a variant or feature, forward or gradient, with float64."""
    fraction, problem = run_check(check)
    report(name, fraction <= 1, problem or f"{fraction:.2f} of the budget")


def feature(make: Callable[[], Case]) -> float:
    """Compute the largest error of a feature, forward and gradient."""
    problem = GradientCase.random(make())
    case = problem.case
    results = ra.attention(case.q, case.k, case.v, **case.options, backend=kernels, return_lse=True)
    return max(*ratios(case, *results), *problem.ratios(attention_gradients(problem, kernels)).values())


def random_problems(seeds: range, gradient: bool) -> float:
    """Compute the largest error of small problems with a random choice of every feature."""
    return max(feature(partial(random_case, seed)) if gradient else forward_error(seed) for seed in seeds)


def forward_error(seed: int) -> float:
    """Compute the error of one random problem."""
    case = random_case(seed)
    return max(ratios(case, *ra.attention(case.q, case.k, case.v, **case.options, backend=kernels, return_lse=True)))


def words(shape: AttentionShape) -> str:
    """Describe a shape."""
    name = str(shape.dtype).removeprefix("mlx.core.")
    heads = "{}/{}".format(*shape.heads)
    mask = "causal" if shape.causal else "full"
    return f"{name}, {heads} heads x {shape.head_dim}, {shape.queries} x {shape.keys}, {mask}"


def check_large(shape: AttentionShape) -> None:
    """Compare sampled rows with float64, and the bits of five runs."""
    q, k, v = random_arrays(shape)
    mask = "causal" if shape.causal else None
    before = list(threadgroups)

    def attend() -> list[mx.array]:
        results = list(ra.attention(q, k, v, mask=mask, backend=kernels, return_lse=True))
        mx.eval(results)
        return results

    first = attend()
    calls, many = (now - was for now, was in zip(threadgroups, before))
    seconds = timed(attend)
    error = sampled_error(shape, (q, k, v), shape.positions, *first)
    same = all(mx.array_equal(a, b).item() for _ in range(4) for a, b in zip(first, attend()))
    what = f"{error:.2f} of the budget, {seconds:.4f} s"
    what += f", {calls} calls, {many} threadgroups" if calls else ""
    report(words(shape), error <= 1 and same, what + ("" if same else ", OTHER BITS AGAIN"))


def check_side_by_side() -> None:
    """Compare two calls of one compiled function, which may run side by side, with each by itself: the same bits."""
    q, k, v = random_arrays(CUT)

    def attend(q: mx.array) -> list[mx.array]:
        return list(ra.attention(q, k, v, backend=kernels, return_lse=True))

    expected = [attend(x) for x in (q, -q)]
    mx.eval(expected)
    both = mx.compile(lambda x, y: [*attend(x), *attend(y)])
    found = [both(q, -q) for _ in range(5)]
    same = all(mx.array_equal(a, b).item() for pair in found for a, b in zip(pair, sum(expected, [])))
    report("two calls in a compiled function", same, "five times")


def check_gradient(shape: AttentionShape) -> None:
    """Compare with MLX's gradient of its own attention in float32, and the bits of five runs.

    Time the gradient of MLX in the kernels' dtype too.
    """
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
        return ra.attention(q, k, v, mask=mask, backend=kernels)

    def theirs(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5, mask=mask)

    exact = gradient(theirs, *(x.astype(mx.float32) for x in arrays))
    errors = {}
    for name, attend in (("ours", ours), ("mlx", theirs)):
        found = gradient(attend, *arrays)
        errors[name] = max(
            (mx.abs(x.astype(mx.float32) - y).max() / mx.abs(y).max()).item() for x, y in zip(found, exact)
        )
    first = gradient(ours, *arrays)
    same = all(mx.array_equal(a, b).item() for _ in range(4) for a, b in zip(first, gradient(ours, *arrays)))
    seconds = medians({"ours": lambda: gradient(ours, *arrays), "mlx": lambda: gradient(theirs, *arrays)}, 3)
    floor = 1e-5 if shape.dtype == mx.float32 else 0.0  # what MLX's float32 products, the reference, may miss
    right = np.isfinite(errors["ours"]) and errors["ours"] <= 2 * errors["mlx"] + floor
    what = " ".join(f"{name}: error {errors[name]:.1e}, {seconds[name]:.3f} s;" for name in errors)
    report(f"gradient, {words(shape)}", right and same, what + ("" if same else " OTHER BITS AGAIN"))


def _large(quick: bool) -> Checks:
    return [partial(check_large, shape) for shape in (SMALL if quick else SMALL + LARGE)] + [check_side_by_side]


def _gradients(quick: bool) -> Checks:
    return [partial(check_gradient, shape) for shape in (SMALL_GRADIENTS if quick else SMALL_GRADIENTS + GRADIENTS)]


def _variants(quick: bool) -> Checks:
    return [] if quick else [partial(check_variant, one.name, one.check) for one in variants(kernels)]


def _features(quick: bool) -> Checks:
    return [
        partial(check_variant, f"{name}, in {dtype}", partial(feature, partial(in_dtype, make, dtype)))
        for name, make in ({} if quick else FEATURES).items()
        for dtype in FLOATS
    ]


def _random(quick: bool, gradient: bool) -> Checks:
    what = "random gradients" if gradient else "random problems"
    count = RANDOM_GRADIENTS if gradient else RANDOM
    return [
        partial(check_variant, f"{what} from {i} on", partial(random_problems, range(i, i + STEP), gradient))
        for i in range(0, 0 if quick else count, STEP)
    ]


PARTS: dict[str, Callable[[bool], Checks]] = {
    "large": _large,
    "gradients": _gradients,
    "variants": _variants,
    "features": _features,
    "random": partial(_random, gradient=False),
    "random-gradients": partial(_random, gradient=True),
}


@click.command(help=__doc__)
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--kernels", "chosen", type=click.Choice(["cuda", "metal"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Small problems only.")
@click.option("--share", default="0/1", help="i/n: every n-th check from i on.")
def main(parts: tuple[str, ...], chosen: str, quick: bool, share: str) -> None:
    global kernels
    kernels = chosen
    if not mx.cuda.is_available():
        raise click.ClickException("no NVIDIA GPU that MLX can use: pip install 'mlx[cuda13]'")
    mx.set_default_device(mx.gpu)
    if kernels == "metal":
        set_executor(counted)
    checks = [check for part in parts or PARTS for check in PARTS[part](quick)]
    first, step = map(int, share.split("/"))
    for check in checks[first::step]:
        check()
    if kernels == "metal":
        click.echo(f"{threadgroups[0]} calls, {threadgroups[1]} threadgroups")
    click.echo(f"FAILED: {'; '.join(failed)}" if failed else "all checks passed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

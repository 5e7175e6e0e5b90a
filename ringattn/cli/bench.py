"""``ringattn bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import click

from ..errors import ArgumentError
from .verify import machine

DTYPES = ("float16", "bfloat16", "float32")


@click.group()
def bench() -> None:
    """Time parts of ringattn on this machine; every answer is checked first."""


def _numbers(least: int) -> Callable[..., list[int]]:
    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
        if text is None:
            return None
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < least:
            raise click.BadParameter(f"{text!r}, expected numbers of at least {least}, separated by commas")
        return numbers

    return read  # type: ignore[return-value]


def _names(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise click.BadParameter(f"{name!r}, expected some of {', '.join(DTYPES)}, separated by commas")
    return names


def _heads(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if first.isdigit() and second.isdigit() and int(second) and int(first) and int(first) % int(second) == 0:
        return int(first), int(second)
    raise click.BadParameter(f"{text!r}, expected query heads / key-value heads, such as 32/8")


@bench.command()
@click.option("--head-dim", default="64,128", show_default=True, callback=_numbers(1), help="Head dims.")
@click.option("--tokens", callback=_numbers(1), help="Tokens. Default: 4096,16384 on an Apple GPU, else 1024,2048.")
@click.option("--dtype", "dtypes", default="float16", show_default=True, callback=_names, help="Of q, k and v.")
@click.option("--heads", default="32/8", show_default=True, callback=_heads, help="Query / key-value heads.")
@click.option("--causal/--full", default=None, help="One mask only. Default: both.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="The median of so many counts.")
@click.option("--backend", help="Default: the best of this machine.")
def kernel(
    head_dim: list[int],
    tokens: list[int] | None,
    dtypes: list[str],
    heads: tuple[int, int],
    causal: bool | None,
    repeats: int,
    backend: str | None,
) -> None:
    """Time attention against mx.fast.scaled_dot_product_attention.

    For each shape: the forward pass, the same with the log-sum-exp, and one new token against all keys. The exit status
    is 1 if an answer is wrong.
    """
    import mlx.core as mx

    from ..backends import select

    try:
        name = select(backend).__name__.rpartition(".")[2]
    except ArgumentError as error:
        raise click.UsageError(f"--{error}") from None
    lengths = tokens or ([4096, 16384] if mx.metal.is_available() else [1024, 2048])
    masks = [False, True] if causal is None else [causal]
    click.echo(f"attention by {name!r} against mx.fast.scaled_dot_product_attention, {heads[0]}/{heads[1]} heads")
    head = ["head_dim", "tokens", "dtype", "mask", "what", "ours ms", "mlx ms", "mlx / ours", "TFLOP/s", "error"]
    click.echo("".join(f"{title:>12}" for title in head))
    failed = 0
    for shape, words in _shapes(head_dim, lengths, dtypes, heads, masks):
        cells, right = _row(shape, backend, repeats)
        failed += not right
        click.echo("".join(f"{cell:>12}" for cell in (*words, *cells)))
    click.echo("\nerror: of sampled rows, as a fraction of what is allowed against float64")
    click.echo(f"\n--- to paste into a report ---\n{machine()}")
    click.echo(f"kernel {name!r}: {f'{failed} WRONG' if failed else 'all answers within budget'}")
    raise SystemExit(1 if failed else 0)


def _shapes(
    dims: list[int], lengths: list[int], dtypes: list[str], heads: tuple[int, int], masks: list[bool]
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Each problem, and the words for its row."""
    import mlx.core as mx

    from ..bench.kernel import Shape

    for dim, n, dtype, causal in product(dims, lengths, dtypes, masks):
        for what, queries, lse in (("forward", n, False), ("with lse", n, True), ("one token", 1, False)):
            if what != "forward" and causal != masks[-1]:
                continue
            shape = Shape(getattr(mx, dtype), dim, heads, queries, n, causal, lse)
            yield shape, (str(dim), str(n), dtype, "causal" if causal else "full", what)


def _row(shape: Any, backend: str | None, repeats: int) -> tuple[list[str], bool]:
    from ..bench.kernel import measure

    found = measure(shape, backend, repeats)
    if not found.error <= 1:
        return ["-", "-", "-", "-", f"FAIL {found.error:.3g}"], False
    times = [f"{found.ours * 1e3:.2f}", f"{found.mlx * 1e3:.2f}", f"{found.mlx / found.ours:.2f}"]
    return [*times, f"{shape.flops / found.ours / 1e12:.3f}", f"{found.error:.2f}"], True

"""``ringattn bench``. Modules that need MLX are imported when a timing starts, so that ``--help`` is quick."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import click

from ...errors import ArgumentError, KernelWarning
from ...reporting.one_line import in_one_line
from ...reporting.tables import format_row

if TYPE_CHECKING:
    from ...bench.kernel import AttentionShape

DTYPES = ("float16", "bfloat16", "float32")
HEADER = ("head_dim", "tokens", "heads", "dtype", "mask", "what", "ours ms", "mlx ms", "mlx / ours", "TFLOP/s", "error")
WIDTHS = [max(9, len(title)) for title in HEADER]
DEFAULTS = {  # key: whether there is a GPU. MLX's attention on a CPU takes seconds in half precision
    True: {"tokens": "4096,16384", "dtype": "float16", "heads": "32/8"},
    False: {"tokens": "256,512", "dtype": "float32", "heads": "8/2"},
}


@click.group()
def bench() -> None:
    """Time parts of ringattn on this machine. Every answer is checked first."""


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise click.BadParameter(f"{text!r}, expected numbers of at least 1, separated by commas")
    return numbers


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise click.BadParameter(f"{name!r}, expected some of {', '.join(DTYPES)}, separated by commas")
    return names


def parse_heads(text: str) -> tuple[int, int]:
    """Read numbers of query heads and key/value heads, such as ``32/8``."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and int(first) and int(second) and int(first) % int(second) == 0:
        return int(first), int(second)
    raise click.BadParameter(f"{text!r}, expected query heads / key-value heads, such as 32/8")


def _shape_option(name: str, read: Callable[[str], object], what: str) -> Callable:
    """Option whose default is larger on a GPU."""

    def callback(context: click.Context, parameter: click.Parameter, text: str | None) -> object:
        return read(DEFAULTS[_has_gpu()][name] if text is None else text)

    shown = f"{DEFAULTS[True][name]} on a GPU, else {DEFAULTS[False][name]}"
    return click.option(f"--{name}", callback=callback, help=f"{what}  [default: {shown}]")


def _has_gpu() -> bool:
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def _backend(context: click.Context, parameter: click.Parameter, name: str | None) -> str:
    from ...backends import select

    try:
        return select(name).name
    except ArgumentError as error:
        raise click.BadParameter(str(error).removeprefix("backend: ")) from None


@bench.command()
@click.option(
    "--head-dim", default="64,128", show_default=True, callback=lambda *option: _numbers(option[2]), help="Head dims."
)
@_shape_option("tokens", _numbers, "Tokens.")
@_shape_option("dtype", _dtypes, "Of q, k and v.")
@_shape_option("heads", parse_heads, "Query / key-value heads.")
@click.option("--causal/--full", default=None, help="One mask only.  [default: both]")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Samples, of which the median.")
@click.option("--backend", metavar="NAME", callback=_backend, help="The kernel.  [default: the best for this machine]")
def kernel(
    head_dim: list[int],
    tokens: list[int],
    dtype: list[str],
    heads: tuple[int, int],
    causal: bool | None,
    repeats: int,
    backend: str,
) -> None:
    """Time attention against mx.fast.scaled_dot_product_attention.

    Both get the same arrays. For each shape these are timed: the forward pass, the forward pass with the log-sum-exp,
    and one new token against all keys. Each answer is first compared with MLX's, and some of its rows with float64. The
    exit status is 1 if an answer is wrong.
    """
    from ...reporting.machine import device, machine

    click.echo(f"ringattn.attention by {backend!r} against mx.fast.scaled_dot_product_attention, {device()}")
    masks = [False, True] if causal is None else [causal]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelWarning)
        failed = _table(_shapes(head_dim, tokens, dtype, heads, masks), backend, repeats)
    click.echo("\nerror: fraction of the allowed error against float64. TFLOP/s: of ours, for visible pairs only")
    click.echo(f"\n--- to paste into a report, with the table ---\n{machine()}")
    for warning in dict.fromkeys(str(x.message) for x in caught if issubclass(x.category, KernelWarning)):
        click.echo(warning)
    click.echo(f"kernel {backend!r}: {f'{failed} FAILED' if failed else 'all answers within budget'}")
    raise SystemExit(1 if failed else 0)


def _shapes(
    dims: list[int], lengths: list[int], dtypes: list[str], heads: tuple[int, int], masks: list[bool]
) -> Iterator[tuple[str, AttentionShape]]:
    """Yield the shapes to time, each with the name of the call."""
    import mlx.core as mx

    from ...bench.kernel import AttentionShape

    for dtype, dim, n in product(dtypes, dims, lengths):
        for causal in masks:
            yield "forward", AttentionShape(getattr(mx, dtype), dim, heads, n, n, causal)
        yield "with lse", AttentionShape(getattr(mx, dtype), dim, heads, n, n, masks[-1], lse=True)
        yield "one token", AttentionShape(getattr(mx, dtype), dim, heads, 1, n, masks[-1])


def _table(shapes: Iterator[tuple[str, AttentionShape]], backend: str, repeats: int) -> int:
    """Time each shape and print its row at once. Return the number of failures."""
    _print_row(HEADER)
    failed = 0
    for what, shape in shapes:
        cells, right = _measured_cells(shape, backend, repeats)
        dtype = str(shape.dtype).split(".")[-1]
        mask = "causal" if shape.causal else "full"
        _print_row([str(shape.head_dim), str(shape.keys), "{}/{}".format(*shape.heads), dtype, mask, what, *cells])
        failed += not right
    return failed


def _print_row(cells: Sequence[str]) -> None:
    click.echo("  " + format_row(cells, WIDTHS, ">"))


def _measured_cells(shape: AttentionShape, backend: str, repeats: int) -> tuple[list[str], bool]:
    """Cells of a measurement, and whether the answer is right."""
    from ...bench.kernel import measure

    try:
        timing = measure(shape, backend, repeats)
    except (RuntimeError, ValueError) as error:  # of a kernel, or for lack of memory: the next shape may work
        return ["-", "-", "-", "-", f"  FAIL {in_one_line(error)}"], False
    if not timing.error <= 1:
        return ["-", "-", "-", "-", f"  FAIL {timing.error:.3g}"], False
    times = [f"{timing.ours * 1e3:.3f}", f"{timing.mlx * 1e3:.3f}", f"{timing.mlx / timing.ours:.2f}"]
    return [*times, f"{shape.flops / timing.ours / 1e12:.3f}", f"{timing.error:.2f}"], True

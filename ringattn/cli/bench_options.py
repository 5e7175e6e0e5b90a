"""Options of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.device import uses_gpu
from ..errors import ArgumentError
from ..extras import require
from .counts import parse_count

if TYPE_CHECKING:
    from ..bench.problem import AttentionShape

DTYPES = ("float16", "bfloat16", "float32")
PICTURES = (".png", ".svg")


def numbers(text: str) -> list[int]:
    """Read numbers of at least 1, such as ``64,128`` or ``4K,1M``."""
    found = [parse_count(part) or 0 for part in text.split(",")]
    if min(found) < 1:
        raise click.BadParameter(f"{text!r}, expected numbers of at least 1, such as 64 or 4K, separated by commas")
    return found


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Make a reader of names out of `known`, separated by commas."""

    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r}, expected some of {', '.join(known)}, separated by commas")
        return names

    return read


def parse_heads(text: str) -> tuple[int, int]:
    """Read numbers of query heads and key/value heads, such as ``32/8``."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and int(first) and int(second) and int(first) % int(second) == 0:
        return int(first), int(second)
    raise click.BadParameter(f"{text!r}, expected query heads / key-value heads, such as 32/8")


def listed(name: str, read: Callable[[str], Any], default: str, what: str, gpu: str | None = None) -> Callable:
    """Option whose text `read` converts. `gpu` is the default on a GPU, where it differs."""

    def callback(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        return read((gpu if gpu is not None and uses_gpu() else default) if text is None else text)

    shown = default if gpu is None else f"{gpu} on a GPU, else {default}"
    return click.option(f"--{name}", callback=callback, help=f"{what}  [default: {shown}]")


def backend_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str:
    """Name of the chosen kernel, or of the best one."""
    from ..backends import select

    try:
        return select(name).name
    except ArgumentError as error:
        raise click.BadParameter(str(error).removeprefix("backend: ")) from None


def repeats_option(default: int) -> Callable:
    """Option for the number of samples."""
    return click.option(
        "--repeats", default=default, show_default=True, type=click.IntRange(1), help="Samples, of which the median."
    )


def _picture(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Fail before the run if the picture cannot be drawn."""
    if path is not None:
        if path.suffix.lower() not in PICTURES:
            raise click.BadParameter(f"{str(path)!r}, expected a name that ends in {' or '.join(PICTURES)}")
        require("matplotlib", "ringattn[plot]")
    return path


OUTPUT = (
    click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write all samples and figures, for scripts and for --compare.",
    ),
    click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        callback=_picture,
        help="Draw the times: .png or .svg.",
    ),
    click.option(
        "--compare",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Compare with the times that an earlier run wrote with --json.",
    ),
)

MASK = click.option("--causal/--full", default=None, help="One mask only.  [default: both]")


def attention_options(tokens: str, gpu_tokens: str, head_dim: str = "128") -> tuple[Callable, ...]:
    """Options for the shapes of attention on a ring."""
    return (
        listed("tokens", numbers, tokens, "Tokens of the whole sequence.", gpu_tokens),
        listed("head-dim", numbers, head_dim, "Head dims."),
        listed("dtype", names_of(DTYPES), "float32", "Of q, k and v.", "float16"),
        listed("heads", parse_heads, "8/2", "Query / key-value heads.", "32/8"),
    )


def shapes(
    tokens: list[int], head_dim: list[int], dtype: list[str], heads: tuple[int, int], causal: bool | None
) -> Iterator[AttentionShape]:
    """Yield all combinations, of as many queries as keys."""
    import mlx.core as mx

    from ..bench.problem import AttentionShape

    masks = [False, True] if causal is None else [causal]
    for name, dim, n, mask in product(dtype, head_dim, tokens, masks):
        yield AttentionShape(getattr(mx, name), dim, heads, n, n, mask)

"""``ringattn bench``. Modules that need MLX are imported when a timing starts, so that ``--help`` is quick."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from ...errors import ArgumentError, KernelWarning
from ..bench_growth import growth
from ..bench_options import (
    DTYPES,
    MASK,
    OUTPUT,
    attention_options,
    backend_name,
    listed,
    names_of,
    numbers,
    parse_heads,
    repeats_option,
    shapes,
)
from ..bench_run import Output, run_on_ring
from ..host_options import HOSTS, PROCESSES, ranks_option, with_options
from ..lm_command import load_named, warnings_in_one_line
from ..trace_option import trace_option

if TYPE_CHECKING:
    from ...bench.problem import AttentionShape
    from ...bench.records import Record
    from ...transport.interface import Transport

LAYOUTS = ("zigzag", "contiguous", "cyclic")
STRATEGIES = ("auto", "pass_kv", "pass_q", "gather")
ON_A_RING = (
    ranks_option("Ranks.  [default: 2, or one for each slot of the hosts]"),
    *HOSTS,
    *PROCESSES,
    trace_option(),
)
ROUTES = (
    listed("layout", names_of(LAYOUTS), "zigzag", f"Layouts: {', '.join(LAYOUTS)}."),
    listed("strategy", names_of(STRATEGIES), "auto", f"Strategies: {', '.join(STRATEGIES)}."),
)


class WholeSentences(click.Group):
    """Group whose help has the first sentence of each command, which click would cut to one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, one.get_short_help_str(limit=1000)) for name, one in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=WholeSentences)
def bench() -> None:
    """Time parts of ringattn. Every answer is checked first."""


@bench.command()
@with_options(
    listed("head-dim", numbers, "64,128", "Head dims."),
    listed("tokens", numbers, "256,512", "Tokens.", "4096,16384"),
    listed("dtype", names_of(DTYPES), "float32", "Of q, k and v.", "float16"),
    listed("heads", parse_heads, "8/2", "Query / key-value heads.", "32/8"),
    MASK,
    repeats_option(5),
    click.option("--backend", metavar="NAME", callback=backend_name, help="The kernel.  [default: the best one here]"),
    *OUTPUT,
)
def kernel(backend: str, repeats: int, **options: Any) -> None:
    """Time attention against mx.fast.scaled_dot_product_attention.

    Both get the same arrays. For each shape these are timed: the forward pass, the forward pass with the log-sum-exp,
    and one new token against all keys. Each answer is first compared with MLX's, and some of its rows with float64. The
    exit status is 1 if an answer is wrong.
    """
    from ...bench.kernel import FIGURES, KEYS, measure
    from ...reporting.machine import device, machine

    output = Output.pop_from(options)
    output.check()
    click.echo(f"ringattn.attention by {backend!r} against mx.fast.scaled_dot_product_attention, {device()}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelWarning)
        timed = (measure(shape, what, backend, repeats) for what, shape in _kernel_shapes(**options))
        output.show(timed, KEYS, FIGURES)
    click.echo("\nerror: fraction of the allowed error against float64. TFLOP/s: of ours, for visible pairs only")
    click.echo(f"\n--- to paste into a report, with the table ---\n{machine()}")
    for warning in dict.fromkeys(str(x.message) for x in caught if issubclass(x.category, KernelWarning)):
        click.echo(warning)
    status = output.finish({})
    click.echo(f"kernel {backend!r}: {f'{output.failed} FAILED' if output.failed else 'all answers within budget'}")
    raise SystemExit(status)


def _kernel_shapes(
    head_dim: list[int], tokens: list[int], dtype: list[str], heads: tuple[int, int], causal: bool | None
) -> Iterator[tuple[str, AttentionShape]]:
    """Yield the shapes to time, each with the name of the call."""
    import mlx.core as mx

    from ...bench.problem import AttentionShape

    masks = [False, True] if causal is None else [causal]
    for name, dim, n in product(dtype, head_dim, tokens):
        for mask in masks:
            yield "forward", AttentionShape(getattr(mx, name), dim, heads, n, n, mask)
        yield "with lse", AttentionShape(getattr(mx, name), dim, heads, n, n, masks[-1], lse=True)
        yield "one token", AttentionShape(getattr(mx, name), dim, heads, 1, n, masks[-1])


@bench.command()
@with_options(*ON_A_RING, *attention_options("2048,8192", "16384,65536"), MASK, *ROUTES, repeats_option(5), *OUTPUT)
def ring(**options: Any) -> None:
    """Time ring_attention against the same work without a ring.

    Each case shows the median time of a call and its spread (the distance of the quartiles); the time of the same
    scores in one kernel call with all keys (pure compute) and the part of it that the ring reaches; the time of the
    transfers alone and the part of it that no rank waits for (hidden); the bytes that all ranks sent, and those as a
    multiple of the fewest that any exchange of keys needs; the largest growth of a rank's memory.
    """
    _attention_on_ring(False, options)


@bench.command()
@with_options(*ON_A_RING, *attention_options("2048,4096", "8192,32768"), MASK, *ROUTES, repeats_option(5), *OUTPUT)
def train(**options: Any) -> None:
    """Time ring_attention with its gradient against the same work without a ring.

    The columns are those of `ringattn bench ring`. In the minimum of bytes, keys and values travel twice, and their
    gradients once in float32.
    """
    _attention_on_ring(True, options)


def _attention_on_ring(gradient: bool, options: dict[str, Any]) -> None:
    from ...bench.ring import FIGURES, KEYS, RingProblem, measure

    repeats, layouts, strategies = (options.pop(name) for name in ("repeats", "layout", "strategy"))
    cases = {name: options.pop(name) for name in ("tokens", "head_dim", "dtype", "heads", "causal")}

    def all_cases(ring: Transport) -> Iterator[Record]:
        for shape, layout, strategy in product(shapes(**cases), layouts, strategies):
            chosen = None if strategy == "auto" else strategy
            yield measure(ring, RingProblem(shape, layout, chosen, gradient), repeats)

    run_on_ring(all_cases, options, KEYS, FIGURES)


@bench.command()
@with_options(*ON_A_RING, *attention_options("2048,16384", "16384,131072"), repeats_option(200), *OUTPUT)
def decode(repeats: int, **options: Any) -> None:
    """Time decode_attention: one new token against a cache that is spread over the ranks.

    Pure compute is a rank's own attention to its part of the cache. Transfers are one exchange of as many bytes.
    """
    from ...bench.decode import FIGURES, KEYS, measure

    cases = {name: options.pop(name) for name in ("tokens", "head_dim", "dtype", "heads")}
    run_on_ring(lambda ring: (measure(ring, s, repeats) for s in shapes(**cases, causal=True)), options, KEYS, FIGURES)


@bench.command()
@with_options(
    *ON_A_RING,
    listed("bytes", numbers, "65536,1048576,16777216", "Sizes of a message."),
    repeats_option(20),
    *OUTPUT,
)
def links(repeats: int, **options: Any) -> None:
    """Time the links of the ring: a hop in which all ranks send at once, and a small exchange of all with all.

    `ringattn doctor` measures one link after the other, and gives advice.
    """
    from ...bench.links import FIGURES, KEYS, measure_exchange, measure_hop

    sizes = options.pop("bytes")

    def all_cases(ring: Transport) -> Iterator[Record]:
        if ring.size == 1:
            raise ArgumentError("-n: 1, expected at least 2 ranks, between which there are links")
        yield measure_exchange(ring, 64, repeats)
        yield from (measure_hop(ring, size, repeats) for size in sizes)

    run_on_ring(all_cases, options, KEYS, FIGURES)


@bench.command()
@with_options(
    *ON_A_RING,
    click.option("--model", required=True, metavar="PATH", help="As for ringattn generate."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Convert all weights to this dtype."),
    listed("prompt-tokens", numbers, "512,2048", "Lengths of prompts."),
    click.option("--new-tokens", default=16, show_default=True, type=click.IntRange(2), help="Tokens of an answer."),
    click.option(
        "--check-tokens",
        default=256,
        show_default=True,
        type=click.IntRange(1),
        help="Length of the prompt whose answer is compared with plain mlx-lm's.",
    ),
    repeats_option(3),
    *OUTPUT,
)
def generate(
    model: str,
    dtype: str | None,
    prompt_tokens: list[int],
    new_tokens: int,
    check_tokens: int,
    repeats: int,
    **options: Any,
) -> None:
    """Time a language model over the ring: the time to the first token, and the time of each further token."""
    from ...bench.generate import FIGURES, KEYS, ModelBench
    from ...extras import require
    from ...transport.consensus import raise_on_all_ranks

    require("mlx_lm", "ringattn[lm]")

    def all_cases(ring: Transport) -> Iterator[Record]:
        with warnings_in_one_line(ring.rank == 0), raise_on_all_ranks(ring, "bench generate"):
            loaded = load_named(model, dtype)
        timed = ModelBench(ring, model, dtype, loaded, check_tokens, new_tokens)
        yield from (timed.measure(length, repeats) for length in prompt_tokens)

    run_on_ring(all_cases, options, KEYS, FIGURES)


bench.add_command(growth)

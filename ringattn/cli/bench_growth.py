"""``ringattn bench growth``: `bench ring` on several numbers of ranks of this machine, and fitted exponents."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import LaunchError
from ..launcher.processes import available_cores
from .bench_options import DTYPES, OUTPUT, listed, numbers, parse_heads
from .bench_run import Output
from .host_options import ranks_option, with_options

if TYPE_CHECKING:
    from ..bench.records import Record

MOST_REPEATS = 10  # times as many calls of a short length as of the greatest one


@click.command()
@with_options(
    ranks_option("Largest number of local ranks; also 1, 2, 4, ... up to it are measured.", default=4),
    listed("tokens", numbers, "1024,2048,4096,8192,16384", "Tokens of the whole sequence."),
    click.option("--head-dim", default=64, show_default=True, type=click.IntRange(1), help="Head dim."),
    click.option("--dtype", default="float32", show_default=True, type=click.Choice(DTYPES), help="Of q, k and v."),
    click.option(
        "--heads",
        default="2/1",
        show_default=True,
        callback=lambda context, option, text: "{}/{}".format(*parse_heads(text)),
        help="Query / key-value heads.",
    ),
    click.option("--causal/--full", default=True, show_default=True, help="The mask."),
    click.option(
        "--repeats", default=3, show_default=True, type=click.IntRange(1), help="Timed calls at the greatest length."
    ),
    click.option(
        "--continue", "resume", is_flag=True, help="Keep the cases of the --json file, and measure the others."
    ),
    *OUTPUT,
)
def growth(ranks: int, resume: bool, **options: Any) -> None:
    """Fit the growth of time, memory and bytes with the length and with the ranks, beside the theory.

    Each rank has one thread. Time grows with the square of the length, memory and bytes with the length. With more
    ranks, time and a rank's memory fall in proportion, as long as each rank has a core of its own. Shorter calls are
    timed up to 10 times as often as those of the greatest length.

    The file of --json is written after each case, so that a long run can be ended and continued.
    """
    from ..bench.growth import fits, format_fits
    from ..bench.records import load
    from ..reporting.machine import machine

    output = Output.pop_from(options)
    output.check()
    output.drawn = ("peak_bytes",)
    figures = ("efficiency", "sent_bytes", "sent_ratio", "peak_bytes", "tflops", "error")
    about = {"cores": available_cores()}
    if resume and output.json_file is None:
        raise click.UsageError("--continue: only with --json")
    kept = load(output.json_file) if resume and output.json_file is not None and output.json_file.exists() else []
    output.show(_all_records(ranks, options, kept), ("ranks", "tokens"), figures, about)
    click.echo(f"\n{format_fits(fits(output.records, available_cores()))}\n\n{machine()}")
    raise SystemExit(output.finish(about))


def counts(most: int) -> list[int]:
    """Numbers of ranks to measure: the powers of two up to `most`, and `most`."""
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def _all_records(most: int, options: dict[str, Any], kept: Sequence[Record]) -> Iterator[Record]:
    """Records of all cases, those in `kept` as they are."""
    lengths = options["tokens"]
    fixed = {name: options[name] for name in ("dtype", "heads", "head_dim")}
    fixed["mask"] = "causal" if options["causal"] else "full"
    for ranks in counts(most):
        for tokens in lengths:
            case = {"ranks": ranks, "tokens": tokens, **fixed}
            same = [one for one in kept if one.seconds and case.items() <= one.case.items()]
            more = min(MOST_REPEATS, max(lengths) // tokens)
            yield from same[:1] or _records(ranks, tokens, options["repeats"] * more, options)


def _records(ranks: int, tokens: int, repeats: int, options: dict[str, Any]) -> list[Record]:
    """Run ``ringattn bench ring`` on local ranks with one thread each, and read its records."""
    from ..bench.records import load

    mask = "--causal" if options["causal"] else "--full"
    given = {name: options[name] for name in ("dtype", "heads")}
    given |= {"head-dim": options["head_dim"], "tokens": tokens, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.json")
        line = ["bench", "ring", "-n", str(ranks), "--threads", "1", "--json", str(file), mask]
        line += [part for name, value in given.items() for part in (f"--{name}", str(value))]
        done = subprocess.run([sys.executable, "-m", "ringattn.cli", *line], capture_output=True, text=True)
        if not file.exists():
            raise LaunchError(f"bench ring on {ranks} ranks ended with {done.returncode}: {done.stderr.strip()}")
        return load(file)

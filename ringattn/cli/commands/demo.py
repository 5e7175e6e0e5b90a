"""``ringattn demo``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from ...demo.document import read_document
from ...demo.job import Job
from ...demo.runs import Run, run
from ...extras import require
from ..host_options import ranks_option

BAR = 1000  # steps of the progress bar
MINUTES = "This takes about 1 minute on 4 cores and 2 on 2."


def _checked_picture(context: click.Context, option: click.Parameter, path: Path) -> Path:
    """Refuse before the run what would only fail after it."""
    if path.name and not path.parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}")
    if path.name and path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: expected a name that ends in .png")
    return path


@click.command()
@ranks_option("Processes to spread it over.", least=2, most=64, default=4)
@click.option(
    "--characters",
    type=click.IntRange(min=100),
    metavar="N",
    help="Read only the first N characters of the document.  [default: all]",
)
@click.option(
    "--chunk",
    default=512,
    show_default=True,
    type=click.IntRange(min=16),
    help="Tokens a rank computes in one round of reading.",
)
@click.option("--max-tokens", default=40, show_default=True, type=click.IntRange(min=1), help="Tokens of the answer.")
@click.option(
    "--picture",
    default="ringattn-demo.png",
    show_default=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_checked_picture,
    help="Where to draw the timeline of the ring; '' for nowhere.",
)
def demo(ranks: int, characters: int | None, chunk: int, max_tokens: int, picture: Path) -> None:
    """Let a whole language model read a real document on several processes and answer a question about it.

    SmolLM2-135M reads CPython's help on its debugger, some 5,000 tokens, with its keys and values spread over local
    processes; then one process does the same with plain mlx-lm. The exit status is 1 when their tokens differ.
    """
    from ...demo import report

    _check_installed(picture)
    document = read_document()[:characters]
    click.echo(_plan(ranks, document), err=True)
    ring, alone = (_followed(Job("smollm2", size, chunk, max_tokens, document)) for size in (ranks, 0))
    click.echo(report.report(ring, alone))
    if picture.name:
        from ...demo.picture import draw

        draw(ring, picture)
        click.echo(f"Timeline of the ring: {picture}")
    if not report.passed(ring, alone):
        raise SystemExit(1)


def _check_installed(picture: Path) -> None:
    from ...lm.gguf import find_smollm2

    find_smollm2()
    require("mlx_lm", "ringattn[lm]")
    if picture.name:
        require("matplotlib", "ringattn[plot]")


def _plan(ranks: int, document: str) -> str:
    """What is about to happen, and how long it takes."""
    return (
        f"SmolLM2-135M reads {len(document):,} characters on {ranks} ranks, then in 1 process of plain mlx-lm. Nothing "
        f"is downloaded. {MINUTES}"
    )


def _followed(job: Job) -> Run:
    """Run `job` and show how far it is: a bar on a terminal, lines elsewhere."""
    label = "1 process, plain mlx-lm" if job.plain else f"{job.ranks} ranks"
    with tempfile.TemporaryDirectory(prefix="ringattn-demo-") as folder:
        if not sys.stderr.isatty():
            return run(job, Path(folder), Steps(label))
        with click.progressbar(length=BAR, label=label.ljust(23), file=sys.stderr, show_eta=True) as bar:
            return run(job, Path(folder), lambda share: bar.update(int(share * BAR) - bar.pos))


class Steps:
    """Progress as lines on standard error: when the model is being loaded, and after each tenth of the prompt."""

    def __init__(self, label: str):
        self._label = label
        self._tenths = 0
        click.echo(f"{label}: loading the model", err=True)

    def __call__(self, share: float) -> None:
        """Print a line if another tenth has been read."""
        tenths = int(10 * share)
        if tenths > self._tenths:
            self._tenths = tenths
            click.echo(f"{self._label}: {10 * tenths} % of the prompt is read", err=True)

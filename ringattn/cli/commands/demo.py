"""``ringattn demo``."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import click

from ...demo.document import read_document
from ...demo.job import Job
from ...demo.runs import Run, run
from ...errors import MissingExtraError, RingAttentionError

BAR = 1000  # steps of the progress bar


def _checked_picture(context: click.Context, option: click.Parameter, path: Path) -> Path:
    """Refuse before the run what would only fail after it."""
    if path.name and not path.parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}")
    if path.name and path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: expected a name that ends in .png")
    return path


@click.command()
@click.option("--ranks", default=4, show_default=True, type=click.IntRange(2, 64), help="Processes to spread it over.")
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

    document = read_document()[:characters]
    try:
        _check_installed(picture)
        ring, alone = (_with_bar(Job("smollm2", size, chunk, max_tokens, document)) for size in (ranks, 0))
    except RingAttentionError as error:
        raise click.ClickException(str(error)) from None
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
    if importlib.util.find_spec("mlx_lm") is None:
        raise MissingExtraError("mlx_lm is not installed: pip install 'ringattn[lm]'")
    if picture.name and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib is not installed: pip install matplotlib (or give --picture '')")


def _with_bar(job: Job) -> Run:
    label = "1 process, plain mlx-lm" if job.plain else f"{job.ranks} ranks"
    with (
        tempfile.TemporaryDirectory(prefix="ringattn-demo-") as folder,
        click.progressbar(length=BAR, label=label.ljust(23), file=sys.stderr, show_eta=True) as bar,
    ):
        return run(job, Path(folder), lambda share: bar.update(int(share * BAR) - bar.pos))

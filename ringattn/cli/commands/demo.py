"""``ringattn demo``."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from ...demo.document import read_document
from ...demo.processes import TaskResult, run_task
from ...demo.task import MODEL, ReadingTask
from ...extras import require
from ...tracing.files import VARIABLE, split_names
from ..host_options import ranks_option, tensor_option
from ..output_files import problem_with
from ..trace_option import trace_option

BAR_STEPS = 1000
MINUTES = "This takes about 1 minute on 4 cores and 2 on 2."


def _checked_picture(context: click.Context, option: click.Parameter, path: Path) -> Path:
    """Fail before the run if the picture cannot be saved."""
    if path.name and (problem := problem_with(path)):
        raise click.BadParameter(f"{path}: {problem}")
    if path.name and path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: expected a name that ends in .png")
    return path


@click.command()
@ranks_option("Processes to spread it over.", least=2, most=64, default=4)
@tensor_option
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
@trace_option()
@click.option("--model", default=MODEL, hidden=True)  # for tests with a tiny model
def demo(
    ranks: int, tensor: int, characters: int | None, chunk: int, max_tokens: int, picture: Path, model: str
) -> None:
    """Let a whole language model read a real document on several processes and answer a question about it.

    SmolLM2-135M reads CPython's help on its debugger, some 5,000 tokens, with its keys and values spread over local
    processes; then one process does the same with plain mlx-lm. The exit status is 1 when their tokens differ.
    """
    from ...demo import report

    if ranks % tensor:
        raise click.UsageError(f"--tensor: {tensor}, expected a divisor of {ranks}, the number of ranks")
    _check_installed(model, picture)
    document = read_document()[:characters]
    over_ring, plain = (
        ReadingTask(model, size, chunk, max_tokens, document, t) for size, t in ((ranks, tensor), (0, 1))
    )
    click.echo(_plan(over_ring), err=True)
    if picture.name:
        picture.unlink(missing_ok=True)  # an old one must not pass for the new one
    traces = split_names(os.environ.get(VARIABLE, ""))
    ring = _run_with_progress(over_ring, [*traces, *([picture] if picture.name else [])])
    single = _run_with_progress(plain)
    click.echo(report.report(ring, single))
    if picture.name and picture.exists():
        click.echo(f"Timeline of the ring: {picture}")
    if not report.passed(ring, single):
        raise SystemExit(1)


def _check_installed(model: str, picture: Path) -> None:
    from ...lm.gguf import find_smollm2

    if model == MODEL:
        find_smollm2()
    require("mlx_lm", "ringattn[lm]")
    if picture.name:
        require("matplotlib", "ringattn[plot]")


def _plan(task: ReadingTask) -> str:
    """Announcement of the work and of the time that it takes."""
    return (
        f"{task.model_title} reads {len(task.document):,} characters on {task.ranks_title}, then in 1 process of plain "
        f"mlx-lm. Nothing is downloaded. {MINUTES}"
    )


def _run_with_progress(task: ReadingTask, traces: Sequence[Path] = ()) -> TaskResult:
    """Run `task` and show its progress: a bar on a terminal, lines elsewhere."""
    label = "1 process, plain mlx-lm" if task.plain else task.ranks_title
    with tempfile.TemporaryDirectory(prefix="ringattn-demo-") as folder:
        if not sys.stderr.isatty():
            return run_task(task, Path(folder), ProgressLines(label), traces)
        with click.progressbar(length=BAR_STEPS, label=label.ljust(23), file=sys.stderr, show_eta=True) as bar:
            return run_task(task, Path(folder), lambda share: bar.update(int(share * BAR_STEPS) - bar.pos), traces)


class ProgressLines:
    """Progress as lines on standard error: one before the model loads, and one for each tenth of the prompt."""

    def __init__(self, label: str):
        self._label = label
        self._tenths = 0
        click.echo(f"{label}: loading the model", err=True)

    def __call__(self, share: float) -> None:
        """Print a line if another tenth is read."""
        tenths = int(10 * share)
        if tenths > self._tenths:
            self._tenths = tenths
            click.echo(f"{self._label}: {10 * tenths} % of the prompt is read", err=True)

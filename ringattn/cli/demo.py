"""``ringattn demo``."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

from ..demo.job import Job
from ..demo.runs import Run, read_text, run
from ..errors import MissingExtraError, RingAttentionError
from ..schedule import STRATEGIES


def _checked_picture(context: click.Context, option: click.Parameter, path: Path) -> Path:
    """Refuse before the run what would only fail after it."""
    if path.name and not path.parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}")
    if path.name and path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: expected a name that ends in .png")
    return path


@click.command()
@click.option("--ranks", default=4, show_default=True, type=click.IntRange(2, 64), help="Processes to spread it over.")
@click.option("--tokens", default=16384, show_default=True, type=click.IntRange(min=256), help="Length of the text.")
@click.option("--layers", default=2, show_default=True, type=click.IntRange(1, 30), help="Layers of the model to run.")
@click.option("--strategy", default="pass_kv", show_default=True, type=click.Choice(STRATEGIES), help="What travels.")
@click.option(
    "--picture",
    default="ringattn-demo.png",
    show_default=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_checked_picture,
    help="Where to draw the timeline of the ring; '' for nowhere.",
)
def demo(ranks: int, tokens: int, layers: int, strategy: str, picture: Path) -> None:
    """Let a real language model read a long real text on several processes, and check the answer.

    The first layers of SmolLM2-135M read CPython's help topics, the tokens dealt out over local processes. Sampled rows
    of every layer's attention are held against float64, and the whole against one process that does it alone.
    The exit status is 1 when an error exceeds its budget.
    """
    from ..demo import report

    try:
        ring, alone = _run(ranks, tokens, layers, strategy, picture)
    except RingAttentionError as error:
        raise click.ClickException(str(error)) from None
    click.echo(report.report(ring, alone))
    if picture.name:
        from ..demo.picture import draw

        draw(ring, picture)
        click.echo(f"Timeline of the ring: {picture}")
    if not report.passed(ring, alone):
        raise SystemExit(1)


def _run(ranks: int, tokens: int, layers: int, strategy: str, picture: Path) -> tuple[Run, Run]:
    """The job on `ranks` processes, and then on one."""
    if picture.name and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib is not installed: pip install matplotlib (or give --picture '')")
    model, text = read_text()
    if tokens > len(text):
        raise click.BadParameter(f"{tokens}, but the text has {len(text)} tokens", param_hint="--tokens")
    jobs = [Job(str(model), size, tokens, layers, strategy) for size in (ranks, 1)]
    ring, alone = (_with_bar(job, text) for job in jobs)
    return ring, alone


def _with_bar(job: Job, text: np.ndarray) -> Run:
    label = f"{job.ranks} processes" if job.ranks > 1 else "1 process  "
    total = job.ranks * job.layers * job.layer_steps
    with (
        tempfile.TemporaryDirectory(prefix="ringattn-demo-") as folder,
        click.progressbar(length=total, label=label, file=sys.stderr, show_eta=False) as bar,
    ):
        return run(job, text, Path(folder), lambda done: bar.update(done - bar.pos))

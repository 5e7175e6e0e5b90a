"""Option ``--trace``, the same for all commands that run a ring."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

from ..extras import require
from ..tracing.files import PICTURES, SUFFIXES, VARIABLE, join_names
from ..transport.environment import launched_by
from .output_files import problem_with


def _checked(context: click.Context, option: click.Parameter, given: tuple[Path, ...]) -> tuple[Path, ...]:
    """Fail before the run if the trace cannot be written. Pass it on to this process's rings and to all ranks.

    The variable reaches ranks on every host, as all variables of ringattn do. Ranks check nothing: only rank 0 writes.
    """
    for path in given if launched_by() == "solo" else ():
        if path.suffix.lower() not in SUFFIXES:
            raise click.BadParameter(f"{str(path)!r}, expected a name that ends in {', '.join(SUFFIXES)}")
        if problem := problem_with(path):
            raise click.BadParameter(f"{str(path)!r}: {problem}")
        if path.suffix.lower() in PICTURES:
            require("matplotlib", "ringattn[plot]")
    if given:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = join_names(given)
        context.call_on_close(lambda: _restore(before))
    return given


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


def trace_option() -> Callable:
    """Make the option. The command does not get its value."""
    return click.option(
        "--trace",
        multiple=True,
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        expose_value=False,
        callback=_checked,
        help="Record each rank's computation, transfers and waits: .json for ui.perfetto.dev, .png or .svg for a "
        "picture; repeatable.",
    )

"""A bar about the reading of a prompt: how much is read, tokens per second, and the time that is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import click

WIDTH = 24  # characters of the bar


def shown() -> bool:
    """Whether somebody sees standard error: it is a terminal, or that of the launcher which passes it on is."""
    return sys.stderr.isatty() or os.environ.get("RINGATTN_TERMINAL") == "1"


def line(done: int, total: int, seconds: float) -> str:
    """The bar when `done` of `total` tokens are read after `seconds`."""
    full = WIDTH * done // max(total, 1)
    rate = done / max(seconds, 1e-9)
    left = f"  {_clock((total - done) / rate)} left" if 0 < done < total else ""
    return f"Reading [{'#' * full}{'-' * (WIDTH - full)}] {done:,}/{total:,} tokens  {rate:,.0f} tokens/s{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar() -> Callable[[int, int], None] | None:
    """mlx-lm's `prompt_progress_callback` that draws it; ``None`` where nobody sees it."""
    if not shown():
        return None
    start, widest, ended = time.monotonic(), 0, False

    def draw(done: int, total: int) -> None:
        nonlocal widest, ended
        if ended:
            return
        ended = done >= total - 1  # the last token gives the first word of the answer, which must find an empty line
        text = line(total if ended else done, total, time.monotonic() - start)
        widest = max(widest, len(text))
        click.echo(f"\r{text.ljust(widest)}", nl=ended, err=True)

    return draw

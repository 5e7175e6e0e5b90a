"""Progress bar of prefill: tokens that are read, tokens per second, and the remaining time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import click

WIDTH = 24  # characters of the bar


def is_visible() -> bool:
    """Whether standard error ends at a terminal, that of this process or of its launcher."""
    return sys.stderr.isatty() or os.environ.get("RINGATTN_TERMINAL") == "1"


def line(done: int, total: int, seconds: float) -> str:
    """Text of the bar when `done` of `total` tokens are read after `seconds`."""
    full = WIDTH * done // max(total, 1)
    rate = done / max(seconds, 1e-9)
    left = f"  {_clock((total - done) / rate)} left" if 0 < done < total else ""
    return f"Reading [{'#' * full}{'-' * (WIDTH - full)}] {done:,}/{total:,} tokens  {rate:,.0f} tokens/s{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_callback() -> Callable[[int, int], None] | None:
    """Make a `prompt_progress_callback` of mlx-lm that draws the bar; ``None`` if it would not be visible."""
    if not is_visible():
        return None
    start = time.monotonic()
    widest = 0
    ended = False

    def draw(done: int, total: int) -> None:
        nonlocal widest, ended
        if ended:
            return
        ended = done >= total - 1  # the last token gives the first word of the answer, which needs a new line
        text = line(total if ended else done, total, time.monotonic() - start)
        widest = max(widest, len(text))
        click.echo(f"\r{text.ljust(widest)}", nl=ended, err=True)

    return draw

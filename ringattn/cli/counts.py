"""Counts of tokens and of bytes as users write them: 131072, 128K or 1M."""

from __future__ import annotations

from typing import Any

import click

UNITS = {"K": 1 << 10, "M": 1 << 20}


def parse_count(text: str) -> int | None:
    """Read a count such as ``4096``, ``128K`` or ``1M``, in units of 1024; ``None`` if `text` is none."""
    text = text.strip()
    unit = UNITS.get(text[-1:].upper())
    digits = text[:-1] if unit else text
    return int(digits) * (unit or 1) if digits.isascii() and digits.isdecimal() else None


class Count(click.IntRange):
    """Count in a range, with or without a unit."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        count = parse_count(value) if isinstance(value, str) else value
        if count is None:
            self.fail(f"{value!r}, expected a count such as 4096, 128K or 1M.", param, ctx)
        return super().convert(count, param, ctx)

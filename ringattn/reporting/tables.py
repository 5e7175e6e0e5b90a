"""Tables of text, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "  # between two columns


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "<", least: int = 0, rule: bool = False
) -> str:
    """Lines of a table whose columns are as wide as their longest cell; empty without rows.

    Args:
        header: The titles of the columns.
        rows: The cells of each row.
        align: ``"<"`` (left) or ``">"`` (right) for each column; the last one also holds for all further columns.
        least: Smallest width of a column in characters.
        rule: Whether a line of dashes follows the header.
    """
    if not rows:
        return ""
    widths = [max(least, *map(len, column)) for column in zip(header, *rows)]
    first, *others = (format_row(row, widths, align) for row in [header, *rows])
    return "\n".join([first, *(["-" * len(first)] if rule else []), *others])


def format_row(cells: Sequence[str], widths: Sequence[int], align: str = "<") -> str:
    """Line of a table with these widths of the columns. See `format_table` for `align`."""
    sides = align.ljust(len(widths), align[-1])
    return GAP.join(f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths)).rstrip()


def format_number(value: float, decimals: int = 0) -> str:
    """`value` with `decimals` decimals, or with two significant digits where these would show 0."""
    return f"{value:,.{decimals}f}" if value >= 10**-decimals else f"{value:.2g}"

"""Report of a benchmark for people: a table whose rows appear as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..reporting.tables import format_row
from .records import FIGURES, Record

LEAST_WIDTH = 9  # characters of a column


class Table:
    """Table of records of one benchmark.

    Args:
        keys: Parameters of a case, in the order of the columns.
        figures: Names of figures, in the order of the columns.
        show: Function that prints a line.
    """

    def __init__(self, keys: Sequence[str], figures: Sequence[str], show: Callable[[str], object]):
        self._keys = keys
        self._figures = figures
        self._show = show
        self._widths: list[int] = []

    def add(self, record: Record) -> None:
        """Print the row of a record, below the titles if it is the first."""
        cells = self._cells(record)
        if not self._widths:
            titles = [*self._keys, "ms", "spread", *(FIGURES[name].title for name in self._figures)]
            self._widths = [max(LEAST_WIDTH, *map(len, pair)) for pair in zip(titles, cells)]
            self._print(titles)
        self._print(cells)

    def _cells(self, record: Record) -> list[str]:
        case = [str(record.case[key]) for key in self._keys]
        if record.problem:
            return [*case, *("-" for _ in range(len(self._figures) + 1)), f"  FAIL {record.problem}"]
        part = record.spread / record.median
        figures = [FIGURES[name].show(record.figures.get(name, float("nan"))) for name in self._figures]
        return [*case, f"{record.median * 1e3:.3f}", f"{part:.0%}", *figures]

    def _print(self, cells: Sequence[str]) -> None:
        self._show("  " + format_row(cells, self._widths, ">"))

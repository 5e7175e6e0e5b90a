"""Comparison of two runs of a benchmark, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..reporting.tables import format_table
from .records import Record

CERTAIN = 2.0  # spreads: a smaller difference is noise


@dataclass(frozen=True)
class Change:
    """Change of one case.

    Attributes:
        new: Record of the new run.
        old: Record of the old run; ``None`` if it had no such case.
    """

    new: Record
    old: Record | None

    @property
    def factor(self) -> float:
        """New time divided by old time."""
        return self.new.median / self.old.median if self.old else float("nan")

    @property
    def verdict(self) -> str:
        """The change: ``"faster"``, ``"slower"``, ``"same"`` within the noise, or ``"new"`` without an old record.

        A difference of medians counts if it exceeds `CERTAIN` times the larger spread of the two.
        """
        if self.old is None or not self.old.seconds:
            return "new"
        if not self.new.seconds:
            return "failed"
        difference = self.new.median - self.old.median
        if abs(difference) <= CERTAIN * max(self.new.spread, self.old.spread):
            return "same"
        return "slower" if difference > 0 else "faster"


def compare(new: Sequence[Record], old: Sequence[Record]) -> list[Change]:
    """Pair each record of the new run with the record of its case in the old run."""
    before = {record.key: record for record in old}
    return [Change(record, before.get(record.key)) for record in new]


def format_changes(changes: Sequence[Change]) -> str:
    """Table of the changes. Cases of one value in all records are left out."""
    keys = varying([change.new for change in changes])
    rows = [
        [
            *(str(change.new.case.get(key, "")) for key in keys),
            f"{change.old.median * 1e3:,.2f}" if change.old else "-",
            f"{change.new.median * 1e3:,.2f}",
            f"{change.factor:.2f}",
            change.verdict,
        ]
        for change in changes
    ]
    return format_table([*keys, "before ms", "now ms", "now / before", ""], rows, align=">")


def varying(records: Sequence[Record]) -> list[str]:
    """Parameters that differ between records, in their order."""
    keys = dict.fromkeys(key for record in records for key in record.case)
    return [key for key in keys if len({record.case.get(key) for record in records}) > 1]

"""Results of checks. Each check runs on its own and gives an error, or the reason why it has none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from ..cuda import launch as cuda_launch
from ..errors import KernelWarning
from ..metal import launch
from ..reporting.one_line import in_one_line
from ..reporting.tables import format_table

Check = Callable[[], float]  # the largest error as a fraction of the allowed error
Results = dict[str, dict[str, float]]  # row -> column -> such a fraction; infinite for a check that raised

CELL = 9  # characters of a cell at least


@dataclass
class Findings:
    """Table of checks.

    Attributes:
        table: Largest errors as fractions of the allowed error.
        failed: Names of the failed checks, each with the reason in one line.
    """

    table: Results = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, column: str, name: str, check: Check) -> None:
        """Run the check `name` and record its result. An exception is recorded, not raised."""
        self.record(row, column, name, *run_check(check))

    def record(self, row: str, column: str, name: str, fraction: float, problem: str = "") -> None:
        """Record the result of the check `name`."""
        self.table.setdefault(row, {})[column] = fraction
        if not fraction <= 1:
            self.failed[name] = problem or f"its error is {fraction:.3g} times what is allowed"


def run_check(check: Check) -> tuple[float, str]:
    """Run a check. Return its error as a fraction and "", or infinity and the problem in one line.

    A GPU kernel that was replaced by plain operations is a problem, even if the answer is right.
    """
    for self_test in (launch.self_test, cuda_launch.self_test):
        self_test.forget()  # otherwise no warning comes for a kernel that an earlier check needed too
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelWarning)
        try:
            fraction = check()
        except Exception as error:  # the next check runs after any exception
            return float("inf"), in_one_line(error)
    replaced = [str(warning.message) for warning in caught if issubclass(warning.category, KernelWarning)]
    return (float("inf"), replaced[0]) if replaced else (fraction, "")


def format_results(tables: list[Results], title: str = "") -> str:
    """Text of several tables beside each other; rows of one name share a line."""
    columns = [(table, key) for table in tables for key in dict.fromkeys(key for row in table.values() for key in row)]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [[name, *(_cell(table.get(name, {}).get(key)) for table, key in columns)] for name in names]
    return format_table([title, *(key for _, key in columns)], rows, align="<>", least=CELL)


def _cell(fraction: float | None) -> str:
    if fraction is None:
        return ""
    if fraction <= 1:
        return f"{fraction:.2f}"
    return f"FAIL {fraction:.4g}" if fraction < 1e4 else "FAIL"

"""What became of checks, each tried on its own: how far off it was, or in words what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from ..cuda import self_test as cuda_self_test
from ..errors import KernelWarning
from ..metal import self_test

Check = Callable[[], float]  # the largest error as a fraction of what is allowed
Results = dict[str, dict[str, float]]  # row -> column -> such a fraction; infinite where there is no right answer

LONGEST = 300  # characters of a message


@dataclass
class Findings:
    """A table of checks.

    Attributes:
        table: The fractions.
        failed: Names of the checks that failed, with one line on what is wrong.
    """

    table: Results = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, column: str, name: str, check: Check) -> None:
        """Try a check that is called `name`, whatever comes of it."""
        self.note(row, column, name, *attempt(check))

    def note(self, row: str, column: str, name: str, fraction: float, problem: str = "") -> None:
        """Write down what came of the check `name`."""
        self.table.setdefault(row, {})[column] = fraction
        if not fraction <= 1:
            self.failed[name] = problem or f"its error is {fraction:.3g} times what is allowed"


def attempt(check: Check) -> tuple[float, str]:
    """The fraction that `check` finds, and nothing; or infinity and what went wrong, in one line.

    A kernel of a GPU that something else took the place of went wrong, though the answer is right.
    """
    cuda_self_test.forget()
    self_test.forget()  # lest a kernel that another check needed as well is replaced unheard
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelWarning)
        try:
            fraction = check()
        except Exception as error:  # whatever it is, the next check is tried
            return float("inf"), in_one_line(error)
    replaced = [str(warning.message) for warning in caught if issubclass(warning.category, KernelWarning)]
    return (float("inf"), replaced[0]) if replaced else (fraction, "")


def in_one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message; of a compiler's also the first line that says error."""
    first, *others = str(error).strip().splitlines() or [""]
    cause = next((line.strip() for line in others if "error" in line.lower()), "")
    return f"{type(error).__name__}: {first} {cause}".strip()[:LONGEST]

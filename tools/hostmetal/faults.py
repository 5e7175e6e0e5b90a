"""Errors of a kernel: reports, and the exceptions that carry them."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (  # in the order of the core's `ReportKind`
    "out_of_bounds",
    "race",
    "uninitialised",
    "write_to_input",
    "unwritten_output",
    "write_conflict",
    "divergence",
    "bad_shuffle",
    "threadgroup_overflow",
)


@dataclass(frozen=True)
class Report:
    """One forbidden action of a kernel.

    Attributes:
        kind: One of `KINDS`.
        buffer: The buffer or threadgroup array, if one is involved.
        offset: The offset in bytes.
        thread: The index of the thread in the threadgroup.
        group: The position of the threadgroup.
        text: A description.
    """

    kind: str
    buffer: str
    offset: int
    thread: int
    group: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}{' of ' * bool(self.buffer)}{self.buffer}: {self.text}"


class RuntimeFault(RuntimeError):  # noqa: N818
    """Forbidden action of a kernel. `reports` has the details."""

    def __init__(self, kernel: str, reports: list[Report]) -> None:
        super().__init__("\n  ".join([f"kernel {kernel}:", *map(str, reports)]))
        self.reports = reports

    @property
    def kinds(self) -> set[str]:
        return {report.kind for report in self.reports}


class CompileError(RuntimeError):
    """Kernel that the compiler refused. The message begins with the compiler's."""


class LintError(CompileError):
    """Kernel that breaks a rule of Metal unknown to the compiler here."""

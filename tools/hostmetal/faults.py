"""What can be wrong with a kernel."""

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
    """One thing that a kernel did and must not do.

    Attributes:
        kind: One of `KINDS`.
        buffer: The buffer or threadgroup array, if it is about one.
        offset: In bytes.
        thread: Its index in the threadgroup.
        group: The threadgroup's position.
        text: What happened.
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
    """A kernel did what it must not do; `reports` says what."""

    def __init__(self, kernel: str, reports: list[Report]) -> None:
        super().__init__("\n  ".join([f"kernel {kernel}:", *map(str, reports)]))
        self.reports = reports

    @property
    def kinds(self) -> set[str]:
        return {report.kind for report in self.reports}


class CompileError(RuntimeError):
    """The compiler refused a kernel; the message begins with what it said."""


class LintError(CompileError):
    """A kernel breaks a rule of Metal that the compiler here does not know."""

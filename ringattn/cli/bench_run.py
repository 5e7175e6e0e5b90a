"""Runs of benchmarks: on a ring or in this process, with a table, and files where the user wants them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError
from ..transport.environment import launched_by
from . import leave
from .output_files import problem_with
from .starting import Placement, check_placement, start_again

if TYPE_CHECKING:
    from ..bench.records import Record
    from ..transport.interface import Transport

DEFAULT_RANKS = 2


@dataclass
class Output:
    """Values of `bench_options.OUTPUT`, and the records of the run.

    Attributes:
        json_file: File to write.
        plot: Picture to draw.
        compare: File of an earlier run.
        records: Records so far.
        drawn: Figures that the picture shows beside the times.
    """

    json_file: Path | None = None
    plot: Path | None = None
    compare: Path | None = None
    records: list[Record] = field(default_factory=list)
    drawn: Sequence[str] = ()

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> Output:
        """Remove the options from a command's `options` and return them."""
        return cls(**{f.name: options.pop(f.name) for f in fields(cls) if f.name in options})

    def check(self) -> None:
        """Fail before the run if a file cannot be read or written.

        Raises:
            ArgumentError: A file cannot be written, or the old file is no benchmark's.
        """
        self._old()
        for name, path in (("--json", self.json_file), ("--plot", self.plot)):
            if path is not None and (problem := problem_with(path)):
                raise ArgumentError(f"{name}: {path}: {problem}")

    def _old(self) -> list[Record]:
        from ..bench.records import load

        try:
            return [] if self.compare is None else load(self.compare)
        except ArgumentError as error:
            raise ArgumentError(f"--compare: {error}") from None

    def show(
        self,
        records: Iterable[Record],
        keys: Sequence[str],
        figures: Sequence[str],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Print each record as a row of a table, as soon as it is measured.

        Args:
            records: The records.
            keys: Columns with the parameters of a case.
            figures: Columns with figures.
            about: Facts for the file, which is then written after each record; ``None``: it is written at the end.
        """
        from ..bench.report import Table

        table = Table(keys, figures, click.echo)
        for record in records:
            table.add(record)
            self.records.append(record)
            if about is not None:
                self._save(about)

    def _save(self, about: Mapping[str, Any]) -> None:
        from ..bench import records
        from ..reporting.machine import machine

        if self.json_file is not None:
            command = " ".join(["ringattn", *sys.argv[1:]])
            records.save(self.json_file, self.records, {"command": command, "machine": machine(), **about})

    def finish(self, about: Mapping[str, Any]) -> int:
        """Print the comparison and write the files. Return the exit status."""
        from ..bench import comparison

        if self.compare is not None:
            changes = comparison.compare(self.records, self._old())
            if any(change.old for change in changes):
                click.echo(f"\n{comparison.format_changes(changes)}")
            else:
                click.echo(f"\n--compare: {self.compare} has none of these cases, expected those of the same options")
        self._save(about)
        if self.plot is not None:
            from ..bench.plot import draw

            draw(self.records, self.plot, self.drawn)
        return 1 if self.failed else 0

    @property
    def failed(self) -> int:
        """Number of cases with a wrong answer."""
        return sum(bool(record.problem) for record in self.records)


Measure = Callable[["Transport"], Iterator["Record"]]


def run_on_ring(measure: Measure, options: dict[str, Any], keys: Sequence[str], figures: Sequence[str]) -> None:
    """Measure on ranks that this command starts, or on those of a launcher. Rank 0 prints and writes files.

    Args:
        measure: Function that yields the records of a ring. Collective.
        options: Options of the command that are not for `measure`: `Placement` and `Output`.
        keys: Columns with the parameters of a case.
        figures: Columns with figures.
    """
    placement = Placement.pop_from(options)
    output = Output.pop_from(options)
    if launched_by() == "solo":
        if (placement.ranks, placement.hosts, placement.hostfile) == (None, None, None):
            placement = replace(placement, ranks=DEFAULT_RANKS)
        output.check()
        if placement.starts_ranks:
            leave(start_again(placement))
    leave(_on_ranks(measure, placement, output, keys, figures))


def _on_ranks(
    measure: Measure, placement: Placement, output: Output, keys: Sequence[str], figures: Sequence[str]
) -> int:
    from .. import init
    from ..reporting.machine import machine
    from ..ring.call import check_ring
    from ..transport.consensus import raise_on_all_ranks

    with check_ring(init()) as ring:
        try:
            with raise_on_all_ranks(ring, "bench"):
                check_placement(placement, ring)
                if ring.rank == 0:
                    output.check()
            if ring.rank:
                return 1 if any(record.problem for record in measure(ring)) else 0
            output.show(measure(ring), keys, figures)
            ranks = f"{ring.size} rank{'s' * (ring.size > 1)} over {ring.backend!r}"
            click.echo(f"\n{machine()}, {ranks} on {len(set(ring.hosts))} host(s)")
            return output.finish({"ranks": ring.size, "hosts": list(ring.hosts)})
        except ArgumentError as error:
            if ring.rank == 0:
                click.echo(f"Error: {error}", err=True)
            return 1

"""Records of benchmarks: statistics, files, comparison with an earlier run, and the table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ringattn.bench.comparison import compare, format_changes
from ringattn.bench.plot import draw, lines, x_axis
from ringattn.bench.records import FIGURES, Record, load, save
from ringattn.bench.report import Table
from ringattn.errors import ArgumentError


def record(tokens: int = 1024, *seconds: float, **more) -> Record:
    return Record("ring", {"tokens": tokens, "mask": "full", **more}, seconds or (0.9, 1.0, 1.1), {"error": 0.25})


def test_median_and_spread() -> None:
    assert record(1, 5.0, 1.0, 2.0, 3.0, 4.0).median == 3.0
    assert record(1, 5.0, 1.0, 2.0, 3.0, 4.0).spread == 2.0
    assert record(1, 7.0).spread == 0.0
    assert math.isnan(Record("ring", {}).median)


def test_records_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    records = [record(), Record("ring", {"tokens": 3}, problem="wrong")]
    save(path, records, {"machine": "this one"})
    found = load(path)
    assert [(r.key, list(r.seconds), r.figures, r.problem) for r in found] == [
        (r.key, list(r.seconds), r.figures, r.problem) for r in records
    ]


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"format": 1, "records": [{"x": 1}]}', '{"format": 2, "records": []}']
)
def test_another_file_is_an_error_that_names_it(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError, match=r"x\.json: .*expected"):
        load(path)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ((0.9, 1.0, 1.1), "same"),
        ((1.0, 1.1, 1.2), "same"),  # within twice the spread
        ((1.9, 2.0, 2.1), "slower"),
        ((0.4, 0.5, 0.6), "faster"),
        ((1.0, 2.0, 3.0), "same"),  # as uncertain as it is slow
        ((), "failed"),
    ],
)
def test_what_moved(now: tuple[float, ...], verdict: str) -> None:
    (change,) = compare([Record("ring", {"tokens": 1024, "mask": "full"}, now)], [record()])
    assert change.verdict == verdict


def test_a_case_without_an_old_record_is_new() -> None:
    changes = compare([record(1024), record(2048)], [record(1024)])
    assert [change.verdict for change in changes] == ["same", "new"]
    lines = format_changes(changes).splitlines()
    assert lines[0].split()[0] == "tokens" and "mask" not in lines[0]  # what does not vary is left out
    assert lines[2].split() == ["2048", "-", "1,000.00", "nan", "new"]


def test_the_table_has_a_row_for_each_record_at_once() -> None:
    shown: list[str] = []
    table = Table(["tokens", "mask"], ["efficiency", "error"], shown.append)
    table.add(record())
    assert shown[0].split() == ["tokens", "mask", "ms", "spread", "of", "pure", "compute", "error"]
    assert shown[1].split() == ["1024", "full", "1,000.000".replace(",", ""), "10%", "-", "0.25"]
    table.add(Record("ring", {"tokens": 3, "mask": "full"}, problem="2 of the allowed error"))
    assert shown[2].split() == ["3", "full", "-", "-", "-", "FAIL", "2", "of", "the", "allowed", "error"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("peak_bytes", 12.5e6, "12.5"), ("token_s", 0.02, "20.0"), ("sent_bytes", 0.0, "0"), ("error", math.nan, "-")],
)
def test_figures_have_units(name: str, value: float, text: str) -> None:
    assert FIGURES[name].show(value) == text


def test_the_picture_is_over_the_number_that_varies_most() -> None:
    records = [record(tokens, ranks=ranks) for tokens in (1, 2, 4) for ranks in (1, 2)]
    assert x_axis(records) == "tokens"
    assert {name: len(own) for name, own in lines(records, "tokens").items()} == {"ranks 1": 3, "ranks 2": 3}
    assert x_axis([record()]) is None


@pytest.mark.parametrize("records", [[], [record()], [record(1), record(2)], [Record("ring", {}, problem="x")]])
def test_pictures_are_drawn(tmp_path: Path, records: list[Record]) -> None:
    pytest.importorskip("matplotlib")
    draw(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

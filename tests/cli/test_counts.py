"""Tests of counts with units."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ringattn.cli.bench_options import numbers
from ringattn.cli.commands.plan import plan
from ringattn.cli.counts import parse_count

ATTENTION = ("--heads", "32/8", "--machine", "2*m3-ultra:256G")


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("4096", 4096), ("128K", 131_072), ("128k", 131_072), (" 1M ", 1 << 20), ("0", 0)]
    + [(text, None) for text in ("", "K", "1G", "-1", "1.5K", "1 K", "1KK", "²")],
)
def test_parsing(text: str, count: int | None) -> None:
    assert parse_count(text) == count


def test_a_plan_takes_units(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    given = ["--context", "128K", "--answer", "1k", "--prefill-step-size", "2K"]
    done = CliRunner().invoke(plan, [*ATTENTION, *given, "--json", str(file)])
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text())
    assert [written[name] for name in ("context", "answer", "prefill_step_size")] == [131_072, 1024, 2048]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [("0K", "range"), ("2000M", "range")]
    + [(text, "expected a count such as 4096, 128K or 1M") for text in ("many", "1.5K", "-1", "")],
)
def test_a_plan_refuses_others(wrong: str, why: str) -> None:
    done = CliRunner().invoke(plan, [*ATTENTION, "--context", wrong])
    line = done.output.splitlines()[-1]
    assert done.exit_code == 2 and "--context" in line and why in line


def test_lists_take_units() -> None:
    assert numbers("4K,8192,1M") == [4096, 8192, 1 << 20]
    with pytest.raises(click.BadParameter, match="expected numbers"):
        numbers("4K,0")

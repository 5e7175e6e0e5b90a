"""``ringattn samples``: files of a checkout that users of a wheel need."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ringattn.cli import main

ROOT = Path(__file__).parents[2]
FILES = {path.name: path for folder in ("examples", "launch") for path in (ROOT / folder).iterdir() if path.is_file()}


def samples(*arguments: str):
    return CliRunner().invoke(main, ["samples", *arguments])


def test_the_list_has_every_file_with_its_title():
    listed = samples().stdout.splitlines()
    assert [line.split()[0] for line in listed] == sorted(FILES, key=lambda name: (FILES[name].parent, name))
    assert any(line.startswith("quickstart.py ") and "Attention over a sequence" in line for line in listed)
    assert any(line.startswith("README.md ") and line.endswith(" A cluster of two to eight Macs") for line in listed)


@pytest.mark.parametrize("name", FILES)
def test_a_sample_is_printed_as_it_is(name):
    assert samples(name).stdout == FILES[name].read_text()


def test_an_unknown_name_is_one_line():
    done = samples("hostfile.yaml")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: Invalid value for NAME: 'hostfile.yaml', expected one of quickstart.py, ")
    assert done.stderr.count("\n") == 1

"""Every family of the installed mlx-lm works over a ring or is refused by name, as docs/models.md says."""

from __future__ import annotations

import os
import re
from importlib.metadata import version

import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from compare_families import UNBUILT, WRONG
from every_family import families
from models_page import PAGE, rows_of

FAMILIES = families()
OFTEN = FAMILIES[::2]  # half a minute's worth
REMEDY = "docs/models.md is out of date: run `make models`"


def test_the_page_has_every_family() -> None:
    """A family that mlx-lm adds later is not on the page, and fails here until it was compared."""
    text = PAGE.read_text()
    assert re.findall(r"^\| (\S+) \| (?!verdict)", text, re.MULTILINE) == FAMILIES, REMEDY
    assert f"mlx-lm {version('mlx-lm')}," in text, REMEDY
    assert f"| {WRONG} |" not in text


@pytest.mark.ranks
@pytest.mark.parametrize(
    "names",
    [OFTEN, pytest.param([name for name in FAMILIES if name not in OFTEN], marks=pytest.mark.slow)],
    ids=["some", "others"],
)
def test_families_do_what_the_page_says(names: list[str]) -> None:
    lines = PAGE.read_text().splitlines()
    for row in rows_of(names):
        assert row.verdict != WRONG, row
        unknown = any(line.startswith(f"| {row.family} | {UNBUILT} |") for line in lines)  # on the page's machine
        assert unknown or str(row) in lines, f"{row}: {REMEDY}"

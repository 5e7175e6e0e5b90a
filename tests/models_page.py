"""The page docs/models.md: what each family of the installed mlx-lm does over a ring.

make models        # compares every family with one process, and writes the page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from typing import NamedTuple

from every_family import families
from spawn import ROOT, spawn

PAGE = ROOT / "docs" / "models.md"
RANKS = 2
INTRODUCTION = """# Models

<!-- Written by `make models`. Change tests/models_page.py, not this page. -->

Every family of mlx-lm {version}, built small with random weights by mlx-lm's own classes, and read on {ranks} ranks
(CPU, float32) in several rounds and single tokens.

- *Works*: the logits are those of one process. The error is at most 32 units in the last place of the largest logit, or
  twice the difference of mlx-lm from itself where it reads in other chunks.
- *Refused*: `ringattn.lm.shard` raises `UnsupportedModelError` with the reason, before anything is computed.
- *Not built*: mlx-lm itself cannot run the family on the machine that wrote this page, so nothing is known.

{count} families: {counts}.
"""


class Row(NamedTuple):
    family: str
    verdict: str
    detail: str

    def __str__(self) -> str:
        return f"| {self.family} | {self.verdict} | {self.detail.replace('|', '/')} |"


def rows_of(names: Sequence[str], timeout: float = 600) -> list[Row]:
    """Compare families with one process, in one job of `RANKS` ranks."""
    result = spawn(RANKS, ["tests/compare_families.py", *names], timeout=timeout)
    found = [Row(*json.loads(line)) for line in result.output.splitlines() if line.startswith('["')]
    if [row.family for row in found] != list(names) or result.code != 0:
        raise RuntimeError(f"after {found[-1].family if found else 'no family'}: {result}")
    return found


def page(rows: Sequence[Row]) -> str:
    """The text of the page."""
    by_verdict = sorted(rows, key=lambda row: row.verdict)
    counts = {verdict: len(list(group)) for verdict, group in groupby(by_verdict, key=lambda row: row.verdict)}
    text = ", ".join(f"{verdict} {number}" for verdict, number in sorted(counts.items(), key=lambda item: -item[1]))
    head = INTRODUCTION.format(version=version("mlx-lm"), ranks=RANKS, count=len(rows), counts=text)
    return "\n".join([head, "| family | verdict | reason |", "|---|---|---|", *map(str, rows), ""])


def main() -> None:
    text = page(rows_of(families()))
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""What goes wrong on a cluster ends all ranks on all hosts in time, says why, and leaves nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from spawn import ROOT, under_load

from launch.virtual import Cluster
from launch.virtual.faults import FAULTS, Outcome, inflict, make_cluster, table

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with make_cluster() as one:
        yield one


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(cluster: Cluster, fault: str) -> None:
    outcome = inflict(cluster, fault)
    assert replace(outcome, seconds=outcome.seconds / under_load(1)).good, f"{outcome}\n{outcome.output}"


def test_the_page_lists_them_all() -> None:
    """The table that people read is one that this code has printed."""
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| `([^`]+)` \|$", text, re.MULTILINE))
    assert list(rows) == list(FAULTS)
    assert all(re.match(FAULTS[fault], cause) for fault, cause in rows.items())


@pytest.mark.parametrize(
    "changed", [{"code": 0}, {"code": None}, {"seconds": 11.0}, {"cause": ""}, {"wrong": True}, {"left": 1}]
)
def test_what_is_not_good(changed: dict) -> None:
    fine = {"fault": "raises", "code": 1, "seconds": 1.0, "cause": "x", "wrong": False, "left": 0, "output": ""}
    assert Outcome(**fine).good and not Outcome(**{**fine, **changed}).good
    assert "| raises | 1 | 1.0 s | `x` |" in table([Outcome(**fine)])

"""Grids whose rows and columns run between hosts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from spawn import ROOT

from launch.virtual import Cluster

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import families

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2, rate="1gbit") as one:
        yield one


@pytest.mark.parametrize("slots", [1, 2])
def test_generate_on_two_hosts(cluster: Cluster, tmp_path: Path, slots: int) -> None:
    """A row between hosts, and rows on one host each, give the answer of one process."""
    folder = families.save(tmp_path)
    command = [sys.executable, "-m", "ringattn.cli", "generate", "--model", str(folder), "-p", "w1 w2 w3", "-m", "9"]
    hosts = ",".join(f"{address}:{slots}" for address in cluster.addresses)
    options = {"capture_output": True, "text": True, "cwd": ROOT}
    alone = cluster.run(command, **options)
    found = cluster.run([*command, "--hosts", hosts, "--tensor", "2", "--interface", "eth0"], **options)
    assert found.returncode == 0 and found.stdout == alone.stdout != "", (alone, found)
    assert f"Ranks: {2 * slots} in rows of 2" in found.stderr

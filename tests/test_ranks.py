"""Runs the tests of ``tests/spmd``, which every rank executes together, on rings of several sizes."""

from __future__ import annotations

import pytest
from spawn import MPIEXEC, spawn

pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_spmd(size: int) -> None:
    result = spawn(size, ["-m", "pytest", "tests/spmd", "-x", "-p", "no:cacheprovider"], timeout=600)
    assert result.code == 0, str(result)


def test_failing_rank_ends_all(tmp_path) -> None:
    """One rank fails a test while the others wait for it: all end, and the cause is told."""
    test = "def test_it(ring):\n    assert ring.rank != 1, 'only here'\n    ring.barrier()\n"
    (tmp_path / "test_one.py").write_text(test)
    arguments = ["-m", "pytest", str(tmp_path), "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    result = spawn(3, [*arguments, "-p", "tests.spmd.conftest"], timeout=60)
    assert result.code not in (0, None), str(result)
    assert "only here" in result.output and "RingError: rank 1 (" in result.output, str(result)

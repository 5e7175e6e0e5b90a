"""Runs of ``tests/spmd_grid``, whose tests all ranks of a grid execute together, on grids of several shapes."""

from __future__ import annotations

import pytest
from spawn import spawn

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 2), (4, 2), (4, 4), (3, 3), (6, 3)])
def test_grid(ranks: int, tensor: int) -> None:
    arguments = ["-m", "pytest", "tests/spmd_grid", "-x", "-p", "no:cacheprovider"]
    result = spawn(ranks, arguments, timeout=600, env={"RINGATTN_TEST_TENSOR": str(tensor)})
    assert result.code == 0, str(result)

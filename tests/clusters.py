"""Which tests can have a virtual cluster."""

import pytest
from spawn import MPIEXEC

from launch.virtual import unavailable

needs_hosts = pytest.mark.skipif(
    unavailable() is not None or MPIEXEC is None, reason=f"{unavailable() or 'there is no mpiexec'}"
)

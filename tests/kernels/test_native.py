"""Native code: MLX's products by NumPy's BLAS."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ringattn.native import load, sgemm

PRODUCTS = """
import {first}
import {second}
import mlx.core as mx, numpy as np
from ringattn.native import sgemm
mx.set_default_device(mx.cpu)
for m, n, k in ((1, 1, 1), (64, 33, 200), (7, 5, 3)):
    for batch in ((), (3,)):
        a, b = mx.random.normal((*batch, m, k)), mx.random.normal((*batch, n, k)).swapaxes(-1, -2)
        exact = np.array(a, np.float64) @ np.array(b, np.float64)
        assert np.abs(np.array(a @ b) - exact).max() < 1e-4
print(sgemm.calls())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX has a fast BLAS elsewhere")
@pytest.mark.parametrize("first, second, counted", [("ringattn", "mlx.core", True), ("mlx.core", "ringattn", False)])
def test_mlx_multiplies_with_numpys_blas_if_ringattn_comes_first(first, second, counted):
    if load(sgemm.LIBRARY, sgemm.FUNCTIONS) is None:
        pytest.skip("there was no compiler")
    script = PRODUCTS.format(first=first, second=second)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (int(found.stdout) > 0) == counted

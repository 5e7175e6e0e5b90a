"""Tests of native code: MLX's products with NumPy's BLAS."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ringattn.native import load, sgemm

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX has a fast BLAS elsewhere"),
    pytest.mark.skipif(load(sgemm.LIBRARY, sgemm.FUNCTIONS) is None, reason="there was no compiler"),
]
PRODUCTS = """
{imports}
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
MULTIPLIED = (
    "import mlx.core as mx; mx.eval(mx.matmul(mx.ones((9, 9)), mx.ones((9, 9)), stream=mx.cpu)); import ringattn"
)
ONES = "import mlx.core as mx, ringattn; print(mx.matmul(mx.ones((9, 9)), mx.ones((9, 9)), stream=mx.cpu).sum().item())"
OTHER_BLAS = "void cblas_sgemm(void) {}"  # leaves what is there, zeros in fresh memory or not: no product in any case


def run(script: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in (sgemm.SWITCH, "LD_PRELOAD")}
    line = [sys.executable, "-c", script]
    return subprocess.run(line, env={**environment, **variables}, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("imports", ["import ringattn, mlx.core", "import mlx.core, ringattn", MULTIPLIED])
def test_mlx_multiplies_with_numpys_blas_whatever_is_imported_first(imports):
    assert int(run(PRODUCTS.format(imports=imports))) > 0


def test_mlx_keeps_its_own_blas_if_the_user_says_so():
    assert int(run(PRODUCTS.format(imports="import ringattn"), **{sgemm.SWITCH: "mlx"})) == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")
def test_a_preloaded_blas_stays(tmp_path: Path):
    """A preloaded BLAS is kept under any name."""
    (tmp_path / "other.c").write_text(OTHER_BLAS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "other.so", "other.c"], cwd=tmp_path, check=True)
    assert float(run(ONES)) == 729
    assert float(run(ONES, LD_PRELOAD=str(tmp_path / "other.so"))) != 729


def test_other_libraries_do_not_see_the_function():
    sgemm.install()
    assert not hasattr(ctypes.CDLL(None), "cblas_sgemm")

"""Tests of full float32 products in MLX. A product that rounds its inputs simulates a device that uses TF32."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from ringattn.native import tf32

IMPORTS = """
import os, warnings
{first}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ringattn
print(os.environ["MLX_ENABLE_TF32"], len(caught))
"""


def rounded(x: mx.array) -> mx.array:
    """Round `x` to the 10 bits of mantissa that TF32 keeps."""
    bits = np.array(x).view(np.uint32)
    return mx.array(((bits + np.uint32(1 << 12)) & ~np.uint32((1 << 13) - 1)).view(np.float32))


@pytest.fixture
def device_with_tf32(monkeypatch):
    monkeypatch.setattr(tf32, "_product", lambda x, y: rounded(x) @ rounded(y))


@pytest.mark.parametrize(
    "first", ["", "import mlx.core", "import mlx.core as mx; mx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)))"]
)
@pytest.mark.parametrize(("given", "value"), [(None, "0"), ("0", "0"), ("1", "1")])
def test_importing_ringattn_sets_the_variable_unless_the_user_has(first, given, value):
    environment = {name: text for name, text in os.environ.items() if name != tf32.VARIABLE}
    if given is not None:
        environment[tf32.VARIABLE] = given
    script = IMPORTS.format(first=first)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [value, "0"], "and a device without TF32 brings no warning"


def test_it_may_be_too_late_only_where_mlx_came_first(monkeypatch):
    monkeypatch.delenv(tf32.VARIABLE, raising=False)
    assert tf32.disable() and os.environ[tf32.VARIABLE] == "0"
    assert not tf32.disable(), "the variable is set now"
    monkeypatch.delenv(tf32.VARIABLE)
    monkeypatch.delitem(sys.modules, "mlx.core")
    assert not tf32.disable() and os.environ[tf32.VARIABLE] == "0"


def test_full_products_are_told_from_rounded_ones(monkeypatch):
    assert not tf32.in_force()
    monkeypatch.setenv(tf32.VARIABLE, "0")
    assert tf32.describe() == "full float32 (MLX_ENABLE_TF32=0)"
    tf32.check()  # warnings are errors in tests


def test_tf32_that_is_in_force_is_warned_of(monkeypatch, device_with_tf32):
    assert tf32.in_force()
    with pytest.warns(RuntimeWarning, match="import ringattn first, or set MLX_ENABLE_TF32=0"):
        tf32.check()
    monkeypatch.setenv(tf32.VARIABLE, "1")
    assert tf32.describe() == "TF32 (MLX_ENABLE_TF32=1)"

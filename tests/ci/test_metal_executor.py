"""Who runs the Metal kernels in the tests, what a GPU without some features skips, and the kernels that find it out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import metal_executor
import mlx.core as mx
import pytest
from metal_executor import SWITCH, on_gpu, reason_to_skip, restore_executor, usual_executor

from ringattn.metal import set_executor
from tools.ci import metal_canary
from tools.ci.metal_canary import CANARIES, run_apart

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without(monkeypatch):
    """Have features be missing on this GPU."""
    return lambda *names: monkeypatch.setattr(metal_executor, "missing", lambda: dict.fromkeys(names, "no such word"))


@pytest.mark.parametrize("name", CANARIES)
def test_each_canary_is_right_where_the_feature_works(name):
    assert CANARIES[name].complaint() == ""


@pytest.mark.parametrize("name", CANARIES)
def test_a_canary_tells_what_is_wrong(name):
    def refuse(call):
        raise RuntimeError("[metal::Device] Unable to build metal library\nprogram_source:7: error")

    run_kernel = usual_executor()
    try:
        set_executor(refuse)
        assert CANARIES[name].complaint() == "[metal::Device] Unable to build metal library program_source:7: error"
        set_executor(lambda call: [y + 1 for y in run_kernel(call)])
        assert CANARIES[name].complaint().startswith("y: [")
    finally:
        restore_executor()


def test_a_canary_may_end_its_process(monkeypatch):
    monkeypatch.setattr(metal_canary.sys, "executable", shutil.which("false"))
    assert run_apart("bfloat") == "ended with 1: "


@pytest.mark.host_runtime
def test_canaries_run_in_processes_of_their_own():
    assert run_apart("simd_sum", host=True) == ""
    assert "metal" in run_apart("simd_sum").lower()  # here is no Metal


@pytest.mark.parametrize(
    "test, needs_host_runtime, gone, expected",
    [
        ("tests/metal/test_plan.py::test_a", False, (), None),
        ("tests/metal/test_plan.py::test_a", True, (), "needs the host runtime"),
        (
            "tests/kernels/test_attention.py::test_each[plain-metal]",
            False,
            ("bfloat",),
            "bfloat does not work on this GPU: no",
        ),
        ("tests/kernels/test_attention.py::test_each[plain-host]", False, ("bfloat",), None),
        ("tests/metal/test_plan.py::test_a[float16]", False, ("bfloat",), None),
        ("tests/metal/test_plan.py::test_a[mlx.core.float32]", False, ("bfloat",), None),
        ("tests/metal/test_plan.py::test_a[bfloat16]", False, ("bfloat",), "bfloat does not work"),
        ("tests/metal/test_plan.py::test_a[float16]", False, ("simd_sum",), "simd_sum does not work"),
    ],
)
def test_what_is_skipped(without, test, needs_host_runtime, gone, expected):
    without(*gone)
    reason = reason_to_skip(test, needs_host_runtime)
    assert reason is None if expected is None else reason.startswith(expected)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_gpu_is_taken_where_there_is_one(monkeypatch, gpu):
    monkeypatch.setattr(mx.metal, "is_available", lambda: gpu)
    assert on_gpu({}) is gpu and on_gpu({SWITCH: ""}) is gpu and on_gpu({SWITCH: "host"}) is False


@pytest.mark.skipif(mx.metal.is_available(), reason="there is an Apple GPU")
@pytest.mark.parametrize("value, expected", [("gpu", "there is no Apple GPU here"), ("cpu", "'cpu', expected gpu or")])
def test_a_wrong_choice_is_one_line(value, expected):
    line = [sys.executable, "-m", "pytest", "--collect-only", "tests/ci/test_metal_executor.py"]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, SWITCH: value}, capture_output=True, text=True)
    assert done.returncode == 4 and done.stderr.startswith(f"ERROR: {SWITCH}: ") and expected in done.stderr

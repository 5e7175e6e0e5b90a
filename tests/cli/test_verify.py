"""``ringattn verify``: it runs every variant of the Metal kernels, and names each variant that fails."""

from __future__ import annotations

import subprocess
from collections import Counter

import mlx.core as mx
import pytest
from click.testing import CliRunner
from metal_executor import restore_executor, usual_executor

from ringattn.cli import main
from ringattn.cli.commands import verify as command
from ringattn.linear import chunks
from ringattn.metal import launch, set_executor
from ringattn.reporting.one_line import in_one_line
from ringattn.verify import variants
from ringattn.verify.feature_checks import ring_findings, verify_local
from ringattn.verify.features import FEATURES
from ringattn.verify.findings import Findings, run_check
from ringattn.verify.linear_features import LINEAR_FEATURES

FEW = {"head_dim 80, float16", "1 query, keys split, bfloat16", "from state to state, float32", "gradient, float32"}
COMPILER = (
    "[metal::Device] Unable to build metal library from source\n\nprogram_source:7:3: error: no such thing\n x\n ^"
)
COMPILER_LINE = "[metal::Device] Unable to build metal library from source program_source:7:3: error: no such thing"


@pytest.fixture
def few(monkeypatch):
    """Restrict the checks to a few variants and one feature."""
    every = [variant for variant in variants.variants() if variant.name in FEW]
    assert len(every) == len(FEW)
    monkeypatch.setattr(variants, "variants", lambda: every)
    monkeypatch.setattr("ringattn.verify.feature_checks.FEATURES", {"causal, float16": FEATURES["causal, float16"]})
    monkeypatch.setattr("ringattn.verify.feature_checks.LINEAR_FEATURES", {"delta rule": LINEAR_FEATURES["delta rule"]})
    yield
    restore_executor()


@pytest.fixture
def as_on_a_mac(monkeypatch):
    """Replace kernels that do not work by plain operations, as on a Mac."""
    monkeypatch.setattr(launch, "default", lambda: True)
    monkeypatch.setattr(launch, "available", lambda: True)
    yield
    launch.self_test.forget()
    restore_executor()


def verify():
    return CliRunner().invoke(main, ["verify", "--ranks", "0"])


def without(part: tuple[str, int]):
    """Executor that cannot compile kernels with this template argument."""
    run_kernel = usual_executor(checks=False)

    def run(call):
        if part in call.template:
            raise RuntimeError(COMPILER)
        return run_kernel(call)

    return run


def failed(done) -> str:
    assert done.exit_code == 1, done.output
    return done.stdout.splitlines()[-1]


def test_the_names_are_different_and_say_what_is_asked_for():
    names = Counter(variant.name for variant in variants.variants())
    assert max(names.values()) == 1
    for dtype in ("float16", "bfloat16", "float32"):
        assert {f"head_dim {dim}, {dtype}" for dim in (64, 80, 96, 128, 192, 256)} < set(names)


def test_each_variant_reaches_the_kernel_that_it_is_named_after():
    """A head_dim above 256 reaches no kernel."""
    seen: dict[str, list] = {}
    run_kernel = usual_executor(checks=False)

    def run(call):
        calls.append((call.name, dict(call.template)))
        return run_kernel(call)

    set_executor(run)
    for variant in variants.variants():
        if variant.dtype == "float32":
            calls = []
            seen[variant.what] = calls
            assert variant.check() <= 1, variant.name
    restore_executor()
    assert not seen["head_dim 264, plain operations"]
    for what, forward in seen.items():
        for _, template in forward[:1]:
            assert template["T"] == mx.float32 and (template["G"] == 2) == ("quer" in what)
    assert [[t["D"], t["DV"]] for _, t in seen["head_dim 192, values 128"]] == [[192, 128]]
    assert [[t["D"], t["BD"]] for _, t in seen["head_dim 44, padded"]] == [[44, 48]]
    assert [t["WM"] for what in seen if "packed" in what for _, t in seen[what]] == [1, 2, 4]
    assert [name.split("_")[1] for name, _ in seen["1 query, keys split"]] == ["forward", "combine"]
    assert ["state_in1" in name for name, _ in seen["from state to state"]] == [False, True]
    assert [name.split("_")[1] for name, _ in seen["gradient"]] == ["forward", "delta", "weights"]


def test_all_is_well(few):
    done = verify()
    assert done.exit_code == 0, done.output
    table = done.stdout.split("\n\n")[0].splitlines()
    assert table[0].split() == ["Metal", "kernels", "float32", "float16", "bfloat16"] and len(table) == 5
    assert done.stdout.endswith("Metal kernels: 4 variants run, without the M5's matrix units\nall within budget\n")
    assert "checking the Metal kernels in float32: from state to state; gradient\n" in done.stderr


def test_a_variant_that_does_not_compile_is_named_and_the_others_run(few):
    set_executor(without(("D", 80)))
    done = verify()
    assert failed(done) == "FAILED: head_dim 80, float16"
    assert f"\nhead_dim 80, float16: RuntimeError: {COMPILER_LINE}\n" in done.stdout
    assert done.stdout.count("FAIL") == 2 and "Traceback" not in done.output


def test_a_variant_that_was_replaced_is_named(few, as_on_a_mac):
    """It fails although the answer is right."""
    set_executor(without(("DV", 64)))  # of forward.metal, delta.metal and combine.metal
    done = verify()
    variants = "from state to state, float32; gradient, float32; 1 query, keys split, bfloat16"
    assert failed(done) == f"FAILED: {variants}; causal, float16 on metal"
    lines = [
        line for line in done.stdout.splitlines() if line.startswith("gradient, float32: the Metal kernel (float32")
    ]
    assert len(lines) == 1 and COMPILER_LINE in lines[0]


def test_every_check_that_needs_a_replaced_kernel_says_so(as_on_a_mac):
    """The library warns of it once."""
    set_executor(without(("D", 80)))
    check = next(variant.check for variant in variants.variants() if variant.name == "head_dim 80, float16")
    assert [COMPILER_LINE in run_check(check)[1] for _ in range(2)] == [True, True]


def test_a_wrong_answer_is_named(few):
    run_kernel = usual_executor(checks=False)
    set_executor(lambda call: [x * (1.1 if "weights" in call.name else 1) for x in run_kernel(call)])
    done = verify()
    assert failed(done) == "FAILED: gradient, float32"
    assert "gradient, float32: its error is " in done.stdout


def test_a_feature_that_raises_is_named(few, monkeypatch):
    monkeypatch.setattr(variants, "variants", lambda: [])

    def broken(call):
        raise KeyError(call.name)

    set_executor(broken)
    found = verify_local()
    assert list(found.failed) == ["causal, float16 on metal"] and found.table["causal, float16"]["host"] <= 1


def test_a_wrong_recurrence_is_named(few, monkeypatch):
    monkeypatch.setattr(variants, "variants", lambda: [])
    monkeypatch.setattr(chunks, "unit_inverse", lambda x: x)
    assert list(verify_local().failed) == ["delta rule on mlx"]


def test_without_a_gpu_it_says_so(few, monkeypatch):
    monkeypatch.setattr(launch, "available", lambda: False)
    done = verify()
    assert done.exit_code == 0 and "Metal kernels: not run here (no Apple GPU)\nall within budget" in done.stdout
    assert done.output.count("Metal") == 1


def test_what_a_ring_replaced_is_told(monkeypatch):
    """The ranks warn on stderr, and their answers are right."""

    def ran(line, **options):
        with open(line[-1], "w") as file:
            file.write('{"plain": {"pass_kv": 0.5}}')
        warning = "a.py:7: KernelWarning: the Metal kernel (x) does not work\n  warnings.warn(\n"
        return subprocess.CompletedProcess(line, 0, "", 2 * warning)

    monkeypatch.setattr(subprocess, "run", ran)
    monkeypatch.setattr(command, "verify_local", Findings)
    monkeypatch.setattr(launch, "available", lambda: False)
    done = CliRunner().invoke(main, ["verify"])
    assert failed(done) == "FAILED: kernel 1 of the ring"
    assert "kernel 1 of the ring: the Metal kernel (x) does not work\n" in done.stdout


def test_what_a_ring_got_wrong_is_named():
    found = ring_findings({"plain": {"pass_kv": 0.5, "pass_q": 2.5, "gather": float("nan")}})
    assert list(found.failed) == ["plain on pass_q", "plain on gather"]


@pytest.mark.parametrize(
    "message,line",
    [
        ("", "ValueError:"),
        ("one", "ValueError: one"),
        (COMPILER, f"ValueError: {COMPILER_LINE}"),
        ("x" * 999, "ValueError: xx"),
    ],
)
def test_an_error_in_one_line(message, line):
    assert in_one_line(ValueError(message)).startswith(line) and len(in_one_line(ValueError(message))) <= 300

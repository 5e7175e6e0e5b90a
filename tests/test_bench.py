"""``ringattn bench`` and ``ringattn verify``: what they print, and what they notice."""

from __future__ import annotations

import mlx.core as mx
import pytest
from click.testing import CliRunner

import ringattn as ra
from ringattn.bench import kernel as speed
from ringattn.bench.timing import medians
from ringattn.cli import main
from ringattn.metal import executor, set_executor
from ringattn.verify import variants
from tools.hostmetal import Runtime


def command(*line: str):
    return CliRunner().invoke(main, list(line))


# bench


def test_kernel_is_timed_after_its_answer_was_checked():
    done = command("bench", "kernel", "--head-dim", "32", "--tokens", "40,65", "--heads", "4/2", "--repeats", "1")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip().startswith("32")]
    assert [row[1] for row in rows] == ["40"] * 4 + ["65"] * 4
    assert [" ".join(row[3:-5]) for row in rows[:4]] == [
        "full forward",
        "causal forward",
        "causal with lse",
        "causal one token",
    ]
    assert all(0 <= float(row[-1]) <= 1 for row in rows) and "all answers within budget" in done.output
    assert "mlx 0." in done.output and "to paste into a report" in done.output


def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(speed, "attention", lambda *a, **o: tuple(x + 0.1 for x in ra.attention(*a, **o)))
    done = command("bench", "kernel", "--head-dim", "32", "--tokens", "40", "--heads", "4/2", "--causal")
    assert done.exit_code == 1 and "FAIL" in done.output and "3 WRONG" in done.output


@pytest.mark.parametrize(
    "line,told",
    [
        (["--head-dim", "0"], "'0', expected numbers of at least 1"),
        (["--tokens", "1,x"], "'1,x', expected numbers"),
        (["--dtype", "float64"], "'float64', expected some of float16"),
        (["--heads", "5/2"], "'5/2', expected query heads / key-value heads"),
        (["--backend", "best"], "--backend: 'best', expected one of"),
    ],
)
def test_wrong_input(line, told):
    done = command("bench", "kernel", *line)
    assert done.exit_code == 2 and told in done.output and done.output.count("\n") == 1


def test_calls_take_turns():
    order: list[str] = []
    medians({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ababab"


def test_work_is_counted_of_visible_pairs():
    shape = speed.Shape(mx.float16, 64, (2, 1), 3, 10, True)
    assert shape.flops == 4 * 2 * 64 * (8 + 9 + 10)


# verify

FEW = ("forward, float16, head_dim 80", "few queries, keys split, bfloat16", "gradient, float32", "from state to state")


@pytest.fixture
def few(monkeypatch):
    every = list(variants.variants())
    assert len(every) == len({name for name, _ in every}) > 50
    monkeypatch.setattr(variants, "variants", lambda: [x for x in every if x[0].startswith(FEW)])
    monkeypatch.setattr("ringattn.cli.verify.verify_local", lambda progress: {"plain": {"host": 0.5}})
    yield
    set_executor(Runtime())


def test_every_variant_is_named(few):
    done = command("verify", "--ranks", "0")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("metal: ")]
    assert len(lines) == 6 and all(0 <= float(line.rpartition(" ")[2]) <= 1 for line in lines)
    assert "all within budget" in done.stdout


def test_a_variant_that_does_not_compile_is_named(few):
    runtime = Runtime()

    def run(call):
        if ("D", 80) in call.template:
            raise RuntimeError("[metal::Device] Unable to build metal library\nprogram_source:7: error: no such thing")
        return runtime(call)

    set_executor(run)
    done = command("verify", "--ranks", "0")
    assert done.exit_code == 1 and "FAILED: forward, float16, head_dim 80" in done.stdout
    assert "metal: forward, float16, head_dim 80: RuntimeError: [metal::Device] Unable to build" in done.stdout


def test_a_wrong_variant_is_named(few):
    runtime = Runtime()
    set_executor(lambda call: [x + ("weights" in call.name) for x in runtime(call)])
    done = command("verify", "--ranks", "0")
    assert done.exit_code == 1 and "FAILED: gradient, float32\n" in done.stdout


def test_a_variant_that_falls_back_is_named(few, monkeypatch):
    """On a Mac plain operations take its place, with a warning, and the answer is right."""
    runtime = Runtime()

    def run(call):
        if ("D", 80) in call.template or "delta" in call.name:
            raise RuntimeError("program_source:7: error: no such thing")
        return runtime(call)

    set_executor(run)
    monkeypatch.setattr(executor, "default", lambda: True)
    monkeypatch.setattr(executor, "available", lambda: True)
    done = command("verify", "--ranks", "0")
    assert done.exit_code == 1 and "FAILED: gradient, float32; forward, float16, head_dim 80\n" in done.stdout
    assert "head_dim 80/80" in done.stdout and "delta for the gradient" in done.stdout


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("ringattn.cli.verify.verify_local", lambda progress: {"plain": {"host": 0.5}})
    monkeypatch.setattr(executor, "available", lambda: False)
    done = command("verify", "--ranks", "0")
    assert done.exit_code == 0 and "Metal kernels: not run here" in done.stdout

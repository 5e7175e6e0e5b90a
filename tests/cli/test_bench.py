"""``ringattn bench``: its output, and the errors that it finds."""

from __future__ import annotations

import re
import warnings

import mlx.core as mx
import pytest
from click.testing import CliRunner

import ringattn as ra
from ringattn.bench import kernel as speed
from ringattn.bench.problem import AttentionShape
from ringattn.bench.timing import medians
from ringattn.cli import main
from ringattn.errors import KernelWarning
from ringattn.metal import launch

SMALL = ("bench", "kernel", "--head-dim", "32", "--tokens", "40", "--heads", "4/2", "--repeats", "1")


def command(*line: str):
    return CliRunner().invoke(main, list(line))


def rows(output: str) -> list[list[str]]:
    """Cells of the table's rows."""
    return [line.split() for line in output.splitlines() if line.startswith(" ") and "head_dim" not in line]


def test_every_shape_is_timed():
    done = command(*SMALL, "--tokens", "40,65", "--dtype", "float16,float32")
    assert done.exit_code == 0, done.output
    table = rows(done.output)
    assert [row[1:4] for row in table] == [
        [n, "4/2", dtype] for dtype in ("float16", "float32") for n in ("40", "65") for _ in range(4)
    ]
    words = [" ".join(row[4:-6]) for row in table]
    assert words == ["full forward", "causal forward", "causal with lse", "causal one token"] * 4
    for *_, ours, spread, theirs, ratio, _, error in table:
        assert float(ours) > 0 and float(theirs) > 0 and float(ratio) > 0 and 0 <= float(error) <= 1
        assert spread.endswith("%")


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_one_mask(mask):
    table = rows(command(*SMALL, f"--{mask}").output)
    assert [row[4] for row in table] == [mask] * 3


@pytest.mark.parametrize("backend", ["host", "metal", "reference"])
def test_it_says_what_ran_where(backend):
    done = command(*SMALL, "--backend", backend, "--full")
    assert done.exit_code == 0, done.output
    title, *_, verdict = done.output.splitlines()
    assert f"'{backend}' against mx.fast.scaled_dot_product_attention, MLX on" in title
    assert verdict == f"kernel '{backend}': all answers within budget"
    assert "to paste into a report" in done.output and f"mlx {mx.__version__}" in done.output


def answering(change, monkeypatch):
    """Replace `ringattn.attention` by a function whose answer `change` alters."""

    def wrong(*arrays, return_lse, **options):
        out, lse = ra.attention(*arrays, return_lse=True, **options)
        out, lse = change(out, lse)
        return (out, lse) if return_lse else out

    monkeypatch.setattr(speed, "attention", wrong)
    timed = []

    def instead(calls, *rest, **options):
        timed.append(1)
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(speed, "turns", instead)
    return timed


def in_one_row(out, lse):
    """Change one row, which is none of those compared with float64 if there are several rows."""
    return mx.where(mx.arange(out.shape[2])[:, None] == min(3, out.shape[2] - 1), out + 0.1, out), lse


def nothing(out, lse):
    return out * mx.nan, lse


@pytest.mark.parametrize("change", [lambda out, lse: (out * 1.001, lse), in_one_row, nothing])
def test_a_wrong_answer_is_not_timed(monkeypatch, change):
    timed = answering(change, monkeypatch)
    done = command(*SMALL, "--full")
    assert done.exit_code == 1 and done.output.count("FAIL ") == 3 and not timed
    assert done.output.endswith("kernel 'host': 3 FAILED\n")


def test_a_wrong_lse_is_found(monkeypatch):
    timed = answering(lambda out, lse: (out, lse + 0.01), monkeypatch)
    done = command(*SMALL, "--full")
    assert done.exit_code == 1 and [row[5:7] for row in rows(done.output) if "FAIL" in row] == [["with", "lse"]]
    assert len(timed) == 2 * 2  # of each right answer a first call, and the samples


def test_a_kernel_that_raises_is_a_line_of_the_table(monkeypatch):
    def broken(*arrays, **options):
        raise RuntimeError("[malloc] Attempting to allocate\nmore than there is")

    monkeypatch.setattr(speed, "attention", broken)
    done = command(*SMALL)
    assert done.exit_code == 1 and done.output.count("FAIL RuntimeError: [malloc] Attempting to allocate\n") == 4


def test_a_fallback_is_told(monkeypatch):
    def slower(*arrays, **options):
        warnings.warn("the Metal kernel (x) does not work", KernelWarning, stacklevel=2)
        return ra.attention(*arrays, **options)

    monkeypatch.setattr(speed, "attention", slower)
    done = command(*SMALL, "--full")
    assert done.exit_code == 0 and done.output.count("the Metal kernel (x) does not work") == 1


@pytest.mark.parametrize(
    "line,message",
    [
        (["--head-dim", "0"], "'0', expected numbers of at least 1"),
        (["--head-dim", "64,,128"], "'64,,128', expected numbers"),
        (["--tokens", "1,x"], "'1,x', expected numbers"),
        (["--tokens", ""], "'', expected numbers"),
        (["--dtype", "float64"], "'float64', expected some of float16"),
        (["--heads", "5/2"], "'5/2', expected query heads / key-value heads"),
        (["--heads", "0/0"], "'0/0', expected query heads / key-value heads"),
        (["--repeats", "0"], "0 is not in the range"),
        (["--backend", "best"], "'--backend': 'best', expected one of"),
        (["--backend", "metal"], "'--backend': 'metal' needs an Apple GPU"),
    ],
)
def test_wrong_input(line, message, monkeypatch):
    monkeypatch.setattr(launch, "available", lambda: False)
    done = command("bench", "kernel", *line)
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1


def test_help_lists_the_subcommands():
    done = command("bench", "--help")
    assert done.exit_code == 0
    for name in ("kernel", "ring", "train", "decode", "links", "generate", "growth"):
        assert re.search(rf"^  {name} +(Time|Fit) ", done.output, re.MULTILINE), name


def test_calls_take_turns():
    order: list[str] = []
    medians({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ababab"


def test_work_is_counted_of_visible_pairs():
    shape = AttentionShape(mx.float16, 64, (2, 1), 3, 10, True)
    assert shape.flops == 4 * 2 * 64 * (8 + 9 + 10)


def test_the_list_of_benchmarks_has_whole_sentences() -> None:
    shown = CliRunner().invoke(main, ["bench", "--help"]).output
    commands = shown.partition("Commands:")[2]
    assert "..." not in commands and "against a cache that is spread over the ranks" in " ".join(commands.split())

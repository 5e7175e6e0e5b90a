"""Runs of ``tests/spmd``, whose tests all ranks execute together, on rings of several sizes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from spawn import ROOT, spawn, spawn_mlx

pytestmark = pytest.mark.ranks


# What depends on the number of ranks. Two and three ranks cover every way in which the other tests can fail.
EVERY_SIZE = ("test_both_ways", "test_comm", "test_gradient", "test_in_graph", "test_links", "test_ring")
RECURRENT = "test_lm_recurrent"  # every family on two ranks, and on more some that differ in kind
ALL = (path.stem for path in (ROOT / "tests/spmd").glob("test_*.py"))
REST = sorted(name for name in ALL if name not in (*EVERY_SIZE, RECURRENT))
# Language models that differ in kind, in the place of every family.
KINDS = "not (test_logits or test_greedy_tokens) or llama or gemma3 or gpt_oss or deepseek_v3"
RECURRENT_KINDS = "qwen3_5 or kimi_linear or falcon_h1 or lfm2 or rwkv7 or jamba"
# More ranks and another transport do not repeat the tests with the marker `two_ranks`.
FEWER = "not two_ranks"


def nightly(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def arguments(names: Sequence[str], only: str = "", marks: str = "") -> list[str]:
    """What runs the tests of some files under pytest."""
    files = map("tests/spmd/{}.py".format, names)
    return ["-m", "pytest", *files, "-k", only, "-m", marks, "-x", "-p", "no:cacheprovider"]


def run_everywhere(size: int, names: Sequence[str], only: str = "", marks: str = "") -> None:
    result = spawn(size, arguments(names, only, marks), timeout=600)
    assert result.code == 0, str(result)


@pytest.mark.parametrize(
    ("size", "names"),
    [
        *((size, EVERY_SIZE) for size in (1, 2, 3)),
        (4, [*EVERY_SIZE, "test_device_blocks"]),  # with fewer ranks no block comes into a slot that was read
        (5, ["test_comm", "test_ring"]),
        nightly(5, EVERY_SIZE),
    ],
)
def test_spmd(size: int, names: Sequence[str]) -> None:
    run_everywhere(size, names)


@pytest.mark.parametrize(
    ("size", "only", "marks"), [(2, "", ""), (3, KINDS, FEWER), *(nightly(size, "", "") for size in (1, 3, 4, 5))]
)
def test_spmd_the_rest(size: int, only: str, marks: str) -> None:
    run_everywhere(size, REST, only, marks)


@pytest.mark.parametrize(
    ("size", "families", "marks"),
    [(2, "", ""), (3, RECURRENT_KINDS, FEWER), *(nightly(size, "", "") for size in (1, 3, 4, 5))],
)
def test_spmd_recurrent_families(size: int, families: str, marks: str) -> None:
    run_everywhere(size, [RECURRENT], families, marks)


@pytest.mark.parametrize(
    ("size", "names", "only", "marks", "one_way"),
    [
        (2, [*EVERY_SIZE, *REST], KINDS, FEWER, ""),
        nightly(2, [*EVERY_SIZE, *REST], "", "", ""),
        (3, ["test_comm", "test_in_graph", "test_both_ways"], "", "", ""),
        (2, ["test_comm"], "", "", "1"),
        (3, ["test_comm"], "test_blocks_forwarded_round_the_ring", "", "1"),
    ],
)
def test_spmd_over_mlx(size: int, names: Sequence[str], only: str, marks: str, one_way: str) -> None:
    """Tests pass over mx.distributed. `one_way` simulates links on which a rank must not send and receive at once."""
    results = spawn_mlx(size, arguments(names, only, marks), timeout=600, env={"RINGATTN_MLX_ONE_WAY": one_way})
    assert all(result.code == 0 for result in results), "\n".join(map(str, results))


def test_failing_rank_ends_all(tmp_path) -> None:
    """If one rank fails a test while the others wait for it, all end and print the cause."""
    test = "def test_it(ring):\n    assert ring.rank != 1, 'only here'\n    ring.barrier()\n"
    (tmp_path / "test_one.py").write_text(test)
    where = [str(tmp_path), "--rootdir", str(tmp_path)]
    result = spawn(
        3, ["-m", "pytest", *where, "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.spmd.conftest"], timeout=60
    )
    assert result.code not in (0, None), str(result)
    assert "only here" in result.output and "RingError: rank 1 (" in result.output, str(result)

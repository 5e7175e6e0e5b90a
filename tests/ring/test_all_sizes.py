"""Runs of ``tests/spmd``, whose tests all ranks execute together, on rings of several sizes."""

from __future__ import annotations

import pytest
from spawn import ROOT, spawn, spawn_mlx

pytestmark = pytest.mark.ranks


# What depends on the number of ranks. Two and three ranks cover every way in which the other tests can fail.
EVERY_SIZE = ("test_both_ways", "test_comm", "test_gradient", "test_in_graph", "test_links", "test_ring")
FAMILIES = "test_lm_recurrent"  # every family on two ranks, and on more some that differ in kind
KINDS = "qwen3_5 or kimi_linear or falcon_h1 or lfm2 or rwkv7 or jamba"
REST = sorted(path.stem for path in (ROOT / "tests/spmd").glob("test_*.py") if path.stem not in (*EVERY_SIZE, FAMILIES))


def run_everywhere(size: int, *arguments: str) -> None:
    result = spawn(size, ["-m", "pytest", *arguments, "-x", "-p", "no:cacheprovider"], timeout=600)
    assert result.code == 0, str(result)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_spmd(size: int) -> None:
    run_everywhere(size, *map("tests/spmd/{}.py".format, EVERY_SIZE))


@pytest.mark.parametrize("size", [2, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4, 5))])
def test_spmd_the_rest(size: int) -> None:
    run_everywhere(size, *map("tests/spmd/{}.py".format, REST))


@pytest.mark.parametrize(
    ("size", "families"),
    [(2, ""), (3, KINDS), *(pytest.param(size, "", marks=pytest.mark.slow) for size in (1, 3, 4, 5))],
)
def test_spmd_recurrent_families(size: int, families: str) -> None:
    run_everywhere(size, f"tests/spmd/{FAMILIES}.py", "-k", families)


@pytest.mark.parametrize(
    ("size", "what", "one_way"),
    [
        (2, "", ""),
        (3, "test_comm.py", ""),
        (3, "test_in_graph.py", ""),
        (3, "test_both_ways.py", ""),
        (2, "test_comm.py", "1"),
        (3, "test_comm.py::test_blocks_forwarded_round_the_ring", "1"),
    ],
)
def test_spmd_over_mlx(size: int, what: str, one_way: str) -> None:
    """Tests pass over mx.distributed. `one_way` simulates links on which a rank must not send and receive at once."""
    files = [what] if what else [f"{name}.py" for name in (*EVERY_SIZE, *REST)]
    arguments = ["-m", "pytest", *map("tests/spmd/{}".format, files), "-x", "-p", "no:cacheprovider"]
    results = spawn_mlx(size, arguments, timeout=600, env={"RINGATTN_MLX_ONE_WAY": one_way})
    assert all(result.code == 0 for result in results), "\n".join(map(str, results))


def test_failing_rank_ends_all(tmp_path) -> None:
    """If one rank fails a test while the others wait for it, all end and print the cause."""
    test = "def test_it(ring):\n    assert ring.rank != 1, 'only here'\n    ring.barrier()\n"
    (tmp_path / "test_one.py").write_text(test)
    arguments = ["-m", "pytest", str(tmp_path), "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    result = spawn(3, [*arguments, "-p", "tests.spmd.conftest"], timeout=60)
    assert result.code not in (0, None), str(result)
    assert "only here" in result.output and "RingError: rank 1 (" in result.output, str(result)

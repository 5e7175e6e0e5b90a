"""Tests of the plan for the last wave of blocks."""

from __future__ import annotations

import numpy as np
import pytest

from ringattn.core.masks import Band
from ringattn.cuda.hopper_tiling import HopperTiling
from ringattn.cuda.tail import Tail
from ringattn.kernels.gpu.key_tiles import key_tile_ranges

TILING = HopperTiling.of(128, 128, 4096)


def tail(tiles: int, keys: int, heads: int = 1) -> Tail | None:
    return Tail.of(TILING, np.full((tiles, 4), (0, 0, keys, keys), np.int32), heads)


@pytest.mark.parametrize(
    ("tiles", "heads", "keys", "whole", "runs"),
    [
        (18, 8, 64, 132, 11),  # 12 tiles in 132 blocks
        (100, 1, 128, 0, 5),  # fewer tiles than multiprocessors: 500 blocks in 4 waves of a fifth
        (272, 1, 17, 264, 4),  # of 5, 5, 5 and 2 tiles of keys
        (52, 1, 36, 0, 2),  # 5 runs of 36 tiles would be as long as 4 of 9
    ],
)
def test_the_last_tiles_are_cut(tiles: int, heads: int, keys: int, whole: int, runs: int) -> None:
    found = tail(tiles, keys, heads)
    assert found is not None
    assert (found.tiles, found.whole, found.runs) == (tiles * heads, whole, runs)
    assert found.blocks == whole + (tiles * heads - whole) * runs
    assert found.sums == (tiles * heads - whole, 2, runs, 68, 128)
    assert found.counts.output_shapes[0][0] >= 2 * (tiles * heads - whole)


@pytest.mark.parametrize(
    ("tiles", "keys"),
    [
        (264, 128),  # whole waves
        (131, 128),  # almost
        (4096, 128),  # one wave of 32: little to gain
        (144, 7),  # too few keys to cut
    ],
)
def test_nothing_is_cut_that_gains_little(tiles: int, keys: int) -> None:
    assert tail(tiles, keys) is None


def test_tiles_of_a_causal_mask_are_not_cut() -> None:
    """Short ones come last, and fill the last wave. Those of a short chunk against a long cache are about equal."""
    positions = np.arange(18 * 128, dtype=np.int32)
    reach = key_tile_ranges(Band(None, 0), positions, positions, 128, 1, 128)
    assert Tail.of(TILING, reach, 8) is None
    cache = np.arange(18 * 128 + 30_000, dtype=np.int32)
    reach = key_tile_ranges(Band(None, 0), positions + 30_000, cache, 128, 1, 128)
    found = Tail.of(TILING, reach, 8)
    assert found is not None and found.whole == 132

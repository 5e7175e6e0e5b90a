"""Tests of blocks whose halves travel in both directions, against the whole problem in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from test_gradient import check as check_gradient
from test_ring import LAYOUTS, rows_of, run

import ringattn as ra
from ringattn import ArgumentError, ArgumentTypeError
from ringattn.ring.schedule import STRATEGIES
from ringattn.transport import Ring
from ringattn.verify.oracle import GradientCase, check, random_case


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_cases(both: Ring, kind: str, strategy: str) -> None:
    for seed in range(4):
        case = random_case(2000 + 100 * LAYOUTS.index(kind) + seed)
        out, lse, layout = run(case, both, kind, strategy=strategy)
        check(case, out, lse, rows=rows_of(layout, both.rank), what=f"{seed=} {kind} {strategy}")


@pytest.mark.parametrize("seed", range(24))
def test_gradients_of_random_combinations(both: Ring, seed: int) -> None:
    kind, strategy = LAYOUTS[seed % len(LAYOUTS)], STRATEGIES[seed % 3]
    check_gradient(GradientCase.random(random_case(500 + seed)), both, kind, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bits_repeat(both: Ring, strategy: str) -> None:
    case = random_case(5, q_len=300, k_len=300)
    first = run(case, both, "zigzag", strategy=strategy)[0]
    assert all(mx.array_equal(first, run(case, both, "zigzag", strategy=strategy)[0]) for _ in range(5))


def test_half_goes_either_way(both: Ring) -> None:
    """Both directions together send as many bytes as one, half a block at a time."""
    layout = ra.Layout.contiguous(96 * both.size, both.size)
    x = layout.shard(mx.random.normal((1, 1, layout.length, 8), key=mx.random.key(0)), both.rank)
    before, both.trace = both.bytes_sent, []
    ra.ring_attention(x, x, x, ring=both, layout=layout, strategy="pass_kv")
    trace, both.trace = both.trace, None
    block = 96 * 8 * 4 * 2
    assert both.bytes_sent - before == (both.size - 1) * block
    sent = [event.bytes for event in trace if event.kind == "send"]
    assert sent == [block // 2] * (2 * (both.size - 1))


def test_windows_stay_on_the_way_that_is_shorter(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, keys that only the next rank needs go one way, even for long blocks on separate hosts."""
    if ring.size < 3 or not ring.duplex:
        pytest.skip("nothing to go both ways on")
    monkeypatch.setattr(ring, "hosts", tuple(f"mac{i}" for i in range(ring.size)))
    layout = ra.Layout.contiguous(4096 * ring.size, ring.size)
    x = mx.zeros((1, 1, 4096, 64))
    for window, blocks in ((None, 2 * (ring.size - 1)), (200, 1)):
        ring.trace = []
        ra.ring_attention(x, x, x, ring=ring, layout=layout, window=window, strategy="pass_kv")
        trace, ring.trace = ring.trace, None
        sends = sum(event.kind == "send" for event in trace)
        assert sends == (blocks if window is None or ring.rank + 1 < ring.size else 0)


def test_ranks_must_agree(both: Ring) -> None:
    both.both_ways = both.rank > 0
    x, layout = mx.zeros((1, 1, 4, 8)), ra.Layout.contiguous(4 * both.size, both.size)
    with pytest.raises(ArgumentError, match="both_ways differs between ranks: False on rank 0, True on rank"):
        ra.ring_attention(x, x, x, ring=both, layout=layout)
    both.both_ways = None
    assert ra.ring_attention(x, x, x, ring=both, layout=layout).shape == x.shape


def test_wrong_values(ring: Ring) -> None:
    with pytest.raises(ArgumentTypeError, match="both_ways: int, expected True, False or None"):
        ring.both_ways = 1  # type: ignore[assignment]
    if ring.size < 3:
        with pytest.raises(ArgumentError, match=f"both_ways: True, expected False or None on {ring.size} ranks"):
            ring.both_ways = True
    elif not ring.duplex:
        with pytest.raises(ArgumentError, match="both_ways: True, expected False or None where a rank does one thing"):
            ring.both_ways = True
    assert ring.both_ways is None
    assert np.all(np.array(ring.all_reduce(mx.ones(1))) == ring.size)

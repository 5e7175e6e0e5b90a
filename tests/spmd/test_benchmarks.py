"""Benchmarks on a ring: right answers are timed, with plausible figures; wrong ones are not."""

from __future__ import annotations

import mlx.core as mx
import pytest

from ringattn.bench import decode, links
from ringattn.bench import ring as bench_ring
from ringattn.bench.problem import AttentionShape

SHAPE = AttentionShape(mx.float32, 32, (4, 2), 96, 96, True)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "gather", None])
@pytest.mark.parametrize("layout", bench_ring.LAYOUTS)
def test_a_ring_is_measured(ring, layout, strategy, gradient):
    record = bench_ring.measure(ring, bench_ring.RingProblem(SHAPE, layout, strategy, gradient), 2)
    assert not record.problem and len(record.seconds) == 2 and min(record.seconds) > 0
    figures = record.figures
    assert record.case["ranks"] == ring.size and record.case["strategy"] == (strategy or "auto")
    assert figures["compute_s"] > 0 and figures["transfer_s"] > 0 and figures["efficiency"] > 0
    assert 0 <= figures["overlap"] <= 1 and 0 <= figures["error"] <= 1
    assert ("sent_ratio" in figures) == (ring.size > 1)
    if ring.size > 1 and strategy in ("pass_kv", "gather"):  # queries and their results may be fewer bytes
        assert figures["sent_ratio"] >= 0.999


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_gradients_in_half_precision_are_within_their_budget(ring, dtype):
    shape = AttentionShape(dtype, 32, (4, 2), 96, 96, False)
    assert not bench_ring.measure(ring, bench_ring.RingProblem(shape, "zigzag", None, True), 1).problem


def test_keys_once_to_each_rank_are_the_minimum(ring):
    """Without a mask pass-KV in one direction sends exactly these."""
    if ring.size == 1:
        pytest.skip("nothing is sent")
    shape = AttentionShape(mx.float32, 32, (4, 2), 96, 96, False)
    record = bench_ring.measure(ring, bench_ring.RingProblem(shape, "contiguous", "pass_kv"), 1)
    assert record.figures["sent_ratio"] == pytest.approx(1)
    assert record.figures["sent_bytes"] == 96 * (ring.size - 1) * 2 * 32 * 2 * 4


@pytest.mark.parametrize("gradient", [False, True])
def test_a_wrong_answer_is_not_timed(ring, monkeypatch, gradient):
    right = bench_ring.ring_attention
    wrong_here = ring.rank == ring.size - 1
    monkeypatch.setattr(bench_ring, "warm_up", lambda ring: None)
    monkeypatch.setattr(
        bench_ring, "ring_attention", lambda *x, **options: right(*x, **options) + (0.01 if wrong_here else 0)
    )
    record = bench_ring.measure(ring, bench_ring.RingProblem(SHAPE, "zigzag", None, gradient), 2)
    assert record.problem.endswith(f"on rank {ring.size - 1}") and not record.seconds


def test_a_wrong_gradient_is_not_timed(ring, monkeypatch):
    right = bench_ring.ring_attention
    monkeypatch.setattr(bench_ring, "warm_up", lambda ring: None)
    monkeypatch.setattr(
        bench_ring,
        "ring_attention",
        lambda q, k, v, **options: right(q, 1.01 * k - mx.stop_gradient(0.01 * k), v, **options),
    )
    record = bench_ring.measure(ring, bench_ring.RingProblem(SHAPE, "zigzag", None, True), 2)
    assert "of the allowed error" in record.problem


def test_decoding_is_measured(ring):
    record = decode.measure(ring, SHAPE, 3)
    assert not record.problem and len(record.seconds) == 3
    assert ("sent_ratio" in record.figures) == (ring.size > 1)
    if ring.size > 1:
        assert 1 <= record.figures["sent_ratio"] < 1.5  # the agreement's head


def test_a_wrong_decoding_is_not_timed(ring, monkeypatch):
    right = decode.decode_attention

    def wrong(*arrays, return_lse=False, **options):
        out, lse = right(*arrays, return_lse=True, **options)
        return (out, lse + 0.01) if return_lse else out

    monkeypatch.setattr(decode, "decode_attention", wrong)
    assert "of the allowed error" in decode.measure(ring, SHAPE, 2).problem


@pytest.mark.parametrize("size", [1, 1000])
def test_links_are_measured(ring, size):
    assert links.measure_exchange(ring, size, 3).problem == ""
    if ring.size > 1:
        record = links.measure_hop(ring, size, 3)
        assert record.problem == "" and record.case["bytes"] == size and record.figures["gb_s"] > 0


def test_a_barrier_that_is_mostly_slow_leaves_a_time(ring, monkeypatch):
    if ring.size == 1:
        pytest.skip("no neighbour")
    monkeypatch.setattr(links, "turns", lambda calls, repeats: {"hop": [3.0] * 3, "barrier": [1.0, 9.0, 9.0]})
    assert links.measure_hop(ring, 1000, 3).seconds == [2.0] * 3


def test_a_link_that_changes_bytes_is_found(ring, monkeypatch):
    if ring.size == 1:
        pytest.skip("no neighbour")
    monkeypatch.setattr(
        links, "_pattern", lambda rank, size: bytearray([rank if rank == ring.rank else rank + 100] * size)
    )
    assert "other bytes arrived" in links.measure_hop(ring, 100, 2).problem

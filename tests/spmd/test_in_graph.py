"""Decoding as a node of MLX's graph, where the transport supports it: `decode_attention` does not wait."""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import ArgumentError, Layout, TransformError
from ringattn.transport import Ring, consensus
from ringattn.transport.shared_input import SharedInput


@pytest.fixture(autouse=True)
def in_graph(ring: Ring) -> None:
    if not ring.in_graph_bytes:
        pytest.skip("this transport has no exchange in the graph")


def decode(ring: Ring, seed: int = 0, tokens: int = 1, heads: int = 4, **options) -> tuple[mx.array, mx.array]:
    """Return the result of `decode_attention`, and that of one device for the whole sequence."""
    layout = Layout.weighted(64, [1.0] * (ring.size - 1) + [2.0])
    q, k, v = (
        mx.random.normal((1, h, n, 32), key=mx.random.key(seed + i))
        for i, (h, n) in enumerate(((heads, tokens), (2, 64), (2, 64)))
    )
    mx.eval(q, k, v)
    mine = (layout.shard(x, ring.rank) for x in (k, v))
    options = {"backend": "reference", **options}
    return ra.decode_attention(q, *mine, ring=ring, kv_layout=layout, **options), ra.attention(q, k, v, mask="causal")


def same(pair: tuple[mx.array, mx.array]) -> bool:
    return bool(mx.allclose(*pair, atol=1e-5).item())


@pytest.mark.parametrize("tokens,heads", [(1, 4), (3, 4), (40, 16)], ids=["one", "three", "more than a frame holds"])
def test_result(ring, tokens, heads):
    assert same(decode(ring, tokens=tokens, heads=heads))
    ring.barrier()


def test_it_does_not_wait(ring):
    ring.barrier()
    if ring.rank == 1:
        time.sleep(0.5)
    begin = time.monotonic()
    pairs = [decode(ring, seed) for seed in range(3)]
    seconds = time.monotonic() - begin
    assert seconds < 0.4
    for pair in reversed(pairs):  # in any order
        assert same(pair)


def test_a_result_that_one_rank_never_evaluates(ring):
    pair = decode(ring)
    if ring.rank == 0:
        assert same(pair)
    ring.barrier()


def test_more_calls_than_may_be_open(ring, monkeypatch):
    monkeypatch.setattr(consensus, "IN_GRAPH", 5)
    pairs = [decode(ring, seed) for seed in range(20)]
    assert all(map(same, pairs))


def test_blocks_move_after_it(ring):
    for _ in range(3):
        pair = decode(ring)
        into = bytearray(5)
        ring.wait(ring.send(lambda: [memoryview(b"hello")], tag=1), ring.recv([memoryview(into)], tag=1))
        assert into == b"hello" and same(pair)


def test_kernels_that_differ(ring):
    for seed in range(4):
        assert same(decode(ring, seed, backend="host" if (ring.rank + seed) % 2 else "reference"))


def test_agreements_are_counted_alike_by_all_kernels(ring):
    """Otherwise the heartbeats of ranks with the one kernel say nothing to those with the other."""
    assert same(decode(ring, backend="host" if ring.rank else "reference"))
    count = ring._life._agreed
    assert ring.all_reduce(mx.array([count])).item() == ring.size * count


@pytest.mark.parametrize("evaluated", [True, False])
def test_arguments_that_differ(ring, evaluated):
    """The result is NaN, never a wrong number, and the next call raises."""
    out, _ = decode(ring, scale=0.5 if ring.rank == 0 else 0.25)
    if evaluated:
        assert np.isnan(np.array(out)).all()
    with pytest.raises(ArgumentError, match="decode_attention: scale differs between ranks: 0.5 on rank 0, 0.25 on"):
        ring.barrier()
    assert same(decode(ring))
    ring.barrier()


@pytest.mark.parametrize("backends", [["reference"], ["host", "reference"]], ids=["in the graph", "mixed"])
def test_a_shared_input(ring, backends):
    """The check does not wait, whatever kernel a rank has. The first rank has another input."""
    backend = backends[ring.rank % len(backends)]
    with ring.sharing(SharedInput("the input", mx.array([[5, 6]]), "do so")):
        assert same(decode(ring, backend=backend))
        ring.barrier()
    text = r"decode_attention: the input differs between ranks: \[5, 7\] on rank 0, \[5, 6\] on ranks? .*: do so$"
    with ring.sharing(SharedInput("the input", mx.array([[5, 6 + (ring.rank == 0)]]), "do so")):
        if backend == "host":
            with pytest.raises(ArgumentError, match=text):
                decode(ring, backend=backend)
        else:
            out, _ = decode(ring, backend=backend)
            assert np.isnan(np.array(out)).all()
    with pytest.raises(ArgumentError, match=text):  # the ranks that did not wait raise now, and so do all
        ring.barrier()
    assert same(decode(ring))
    ring.barrier()


@pytest.mark.parametrize("backend", ["host", "reference"])
def test_sizes_that_differ(ring, backend):
    """Rank 0's state is longer than a frame, the others' fit: all ranks make the same gather."""
    try:
        out, _ = decode(ring, tokens=80 if ring.rank == 0 else 1, heads=8, backend=backend)
    except ArgumentError as error:
        assert "decode_attention: q differs between ranks" in str(error)
        if backend == "reference":  # the others raise in the next call, and so does this rank
            with pytest.raises(ArgumentError, match="q differs between ranks"):
                ring.barrier()
    else:
        with pytest.raises(ArgumentError, match="q differs between ranks"):
            ring.barrier()
    assert same(decode(ring))


def test_arguments_that_differ_among_many_calls(ring, monkeypatch):
    monkeypatch.setattr(consensus, "IN_GRAPH", 5)
    with pytest.raises(ArgumentError, match="scale differs between ranks"):
        for step in range(10):
            decode(ring, scale=0.1 * (1 + ring.rank) if step == 2 else 0.5)
    assert step == 8
    assert same(decode(ring))


def test_an_error_on_one_rank(ring):
    """The rank itself raises at once, all ranks in the next call."""
    if ring.rank == 0:
        with pytest.raises(ArgumentError, match="window: 0"):
            decode(ring, window=0)
    else:
        out, _ = decode(ring)
        assert np.isnan(np.array(out)).all()
    with pytest.raises(ArgumentError, match="rank 0: window: 0"):
        ring.barrier()
    assert same(decode(ring))
    ring.barrier()


def test_another_call_on_one_rank(ring):
    if ring.rank == 0:
        with pytest.raises(ArgumentError, match="rank 0 called barrier, .* called decode_attention"):
            ring.barrier()
    else:
        decode(ring)
    with pytest.raises(ArgumentError, match="rank 0 called barrier, .* called decode_attention"):
        ring.barrier()
    assert same(decode(ring))


def test_compile_is_refused(ring):
    layout = Layout.contiguous(8, ring.size)
    k = mx.ones((1, 2, layout.local_length(ring.rank), 8))
    function = mx.compile(lambda q: ra.decode_attention(q, k, k, ring=ring, kv_layout=layout, backend="reference"))
    with pytest.raises(TransformError, match="decode_attention"):
        mx.eval(function(mx.ones((1, 2, 1, 8))))
    assert same(decode(ring))

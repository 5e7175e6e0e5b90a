"""The transport: bytes arrive whole, in order, when they should, and mistakes are errors on every rank."""

from __future__ import annotations

import threading
import time

import mlx.core as mx
import numpy as np
import pytest

from ringattn.errors import ArgumentError, ArgumentTypeError, RingError, TransformError
from ringattn.transport import Signal, init
from ringattn.transport.collectives import SMALL_BYTES
from ringattn.transport.consensus import agree
from ringattn.transport.environment import launched_by
from ringattn.transport.mlx import backend
from ringattn.transport.mpi import progress

INTEGERS = [mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64]
FLOATS = [mx.float16, mx.bfloat16, mx.float32, mx.complex64]
DTYPES = [mx.bool_, *INTEGERS, *FLOATS]
SHAPES = [(), (0, 3), (1,), (5, 7), (3, SMALL_BYTES // 2 + 1)]


def same(x: mx.array, y: mx.array) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and bool(mx.array_equal(x, y).item())


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(1e-3)
    return condition()


def test_a_ring_says_what_it_is(ring):
    told = f"Ring(backend={ring.backend!r}, rank={ring.rank}, size={ring.size}, hosts={ring.hosts!r})"
    assert repr(ring) == str(ring) == told and ring.backend == launched_by() and len(ring.hosts) == ring.size


# exchange


def test_exchange_of_unequal_lengths(ring, rng, monkeypatch):
    monkeypatch.setattr(progress, "CHUNK_BYTES", 1000)
    for _ in range(50):
        lengths = rng.choice([0, 1, 7, 999, 1000, 1001, 2000, 20_000, 70_000], (ring.size, 3))
        payloads = [[rng.bytes(n) for n in row] for row in lengths]
        parts = [memoryview(part) for part in payloads[ring.rank]]
        replies = ring.exchange(parts[: 1 + ring.rank % 3])
        assert [bytes(r) for r in replies] == [b"".join(p[: 1 + i % 3]) for i, p in enumerate(payloads)]


def test_exchange_survives_a_rank_that_runs_ahead(ring):
    for i in range(50):
        if i % ring.size == ring.rank:
            time.sleep(2e-3)
        replies = ring.exchange([memoryview(bytes([i, ring.rank]))])
        assert [bytes(reply) for reply in replies] == [bytes([i, rank]) for rank in range(ring.size)]


def test_exchange_of_large_payload(ring):
    mine = np.full(3_000_000 + ring.rank, ring.rank, np.uint8)
    for rank, reply in enumerate(ring.exchange([memoryview(mine)])):
        assert len(reply) == 3_000_000 + rank
        assert np.all(np.frombuffer(reply, np.uint8) == rank)


# send, recv, wait


@pytest.mark.parametrize("longest", [300, 3_000, 200_000])
def test_blocks_forwarded_round_the_ring(ring, rng, monkeypatch, longest):
    """Blocks travel all the way round, each rank passing on what came, without a word from the main thread."""
    if ring.size == 1:
        pytest.skip("no neighbour")
    monkeypatch.setattr(progress, "CHUNK_BYTES", max(longest // 4, 100))
    monkeypatch.setattr(backend, "PIECE_BYTES", max(longest // 4, 100))
    for _ in range(400 if longest < 1000 else 40):
        lengths = rng.choice([0, 1, longest // 4, longest // 2, longest], (ring.size, 2))
        lengths = np.where(rng.random(lengths.shape) < 0.5, lengths, rng.integers(0, longest + 1, lengths.shape))
        blocks = [[rng.bytes(n) for n in row] for row in lengths]
        held = {ring.rank: [memoryview(part) for part in blocks[ring.rank]]}
        arrived, transfers = (), []
        for hop in range(1, ring.size):
            leaving, coming = (ring.rank - hop + 1) % ring.size, (ring.rank - hop) % ring.size
            transfers.append(ring.send(lambda parts=held[leaving]: parts, tag=hop, after=arrived))
            held[coming] = [memoryview(bytearray(n)) for n in lengths[coming]]
            arrived = [ring.recv(held[coming], tag=hop)]
            transfers += arrived
        ring.wait(*transfers)
        assert all(transfer.done for transfer in transfers)
        assert {i: [bytes(part) for part in parts] for i, parts in held.items()} == dict(enumerate(blocks))


def test_blocks_move_while_the_main_thread_is_away(ring):
    """Sleeping stands for computing: the helper thread alone starts, forwards and finishes."""
    if ring.size == 1:
        pytest.skip("no neighbour")
    block = np.full(1 << 20, ring.rank, np.uint8)
    into = np.full((ring.size, 1 << 20), 255, np.uint8)
    signal = Signal()
    first = ring.recv([memoryview(into[1])], tag=1)
    sends = [ring.send(lambda: [memoryview(block)], tag=1, after=[signal])]
    transfers = [first]
    for hop in range(2, ring.size):
        sends.append(ring.send(lambda hop=hop: [memoryview(into[hop - 1])], tag=hop, after=[transfers[-1]]))
        transfers.append(ring.recv([memoryview(into[hop])], tag=hop))
    signal.open()
    assert wait_until(lambda: all(t.done for t in transfers + sends))
    for hop in range(1, ring.size):
        assert np.all(into[hop] == (ring.rank - hop) % ring.size)
    ring.wait(*transfers, *sends)


def test_recv_after_gate_leaves_its_buffer_alone(ring):
    if ring.size == 1:
        pytest.skip("no neighbour")
    for _ in range(20):
        into, signal = np.zeros(100_000, np.uint8), Signal()
        transfer = ring.recv([memoryview(into)], tag=3, after=[signal])
        send = ring.send(lambda: [memoryview(np.ones(100_000, np.uint8))], tag=3)
        ring.barrier()  # everybody has sent
        time.sleep(5e-3)
        assert not transfer.done and not into.any()
        signal.open()
        ring.wait(transfer, send)
        assert into.all()


def test_send_after_several(ring):
    if ring.size == 1:
        pytest.skip("no neighbour")
    loaded, signals = [], [Signal(), Signal()]

    def load():
        loaded.append(time.monotonic())
        return [memoryview(b"abc")]

    into = memoryview(bytearray(3))
    transfers = [ring.send(load, tag=0, after=signals), ring.recv([into], tag=0)]
    signals[1].open()
    time.sleep(5e-3)
    assert not loaded
    signals[0].open()
    ring.wait(*transfers)
    assert len(loaded) == 1 and bytes(into) == b"abc"


def test_trace_and_bytes_sent(ring):
    if ring.size == 1:
        pytest.skip("no neighbour")
    before, ring.trace = ring.bytes_sent, []
    begin = time.time()
    send = ring.send(lambda: [memoryview(bytes(1000)), memoryview(b"")], tag=4)
    ring.wait(send, ring.recv([memoryview(bytearray(1000)), memoryview(b"")], tag=4))
    trace, ring.trace = ring.trace, None
    assert ring.bytes_sent - before == 1000
    assert sorted((event.kind, event.hop, event.bytes) for event in trace) == [("recv", 4, 1000), ("send", 4, 1000)]
    assert all(begin <= event.start <= event.stop <= time.time() for event in trace)


def test_many_calls_reuse_tags(ring):
    if ring.size == 1:
        pytest.skip("no neighbour")
    for i in range(300):
        into = bytearray(4)
        send = ring.send(lambda i=i: [memoryview(i.to_bytes(4, "little"))], tag=0)
        ring.wait(ring.recv([memoryview(into)], tag=0), send)
        assert int.from_bytes(into, "little") == i


# collectives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast(ring, rng, dtype):
    for root in range(ring.size):
        for shape in SHAPES:
            x = mx.array(rng.integers(0, 2 if dtype == mx.bool_ else 100, shape)).astype(dtype)
            y = ring.broadcast(x if ring.rank == root else None, root)
            assert same(x, y)


def test_broadcast_of_a_view(ring):
    """Arrays whose storage is not in row order: transposed, and repeated without being copied."""
    x = mx.arange(12).reshape(3, 4)
    for view in (x.T, x[:, ::2], mx.broadcast_to(mx.array([1, 2]), (3, 2))):
        assert same(ring.broadcast(view if ring.rank == 0 else None), view)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_all_reduce_of_integers_is_exact(ring, rng, dtype):
    for shape in SHAPES:
        parts = rng.integers(0, 100, (ring.size, *shape))
        total = mx.array(parts[0]).astype(dtype)
        for part in parts[1:]:
            total = total + mx.array(part).astype(dtype)
        assert same(ring.all_reduce(mx.array(parts[ring.rank]).astype(dtype)), total)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_reduce_of_floats(ring, rng, dtype):
    for shape in SHAPES:
        parts = [mx.array(p).astype(dtype) for p in rng.standard_normal((ring.size, *shape)).astype(np.float32)]
        wide = mx.complex64 if dtype == mx.complex64 else mx.float32
        total = parts[0].astype(wide)
        for part in parts[1:]:
            total = total + part.astype(wide)
        first = ring.all_reduce(parts[ring.rank])
        # One cast, at the end: what is left to rounding is nothing at all.
        assert same(first, total.astype(dtype) if ring.size > 1 else parts[0])
        assert same(first, ring.all_reduce(parts[ring.rank]))


def test_all_reduce_of_bool_is_or(ring):
    x = mx.array([ring.rank == 0, False, True])
    assert ring.all_reduce(x).tolist() == [True, False, True]


def test_barrier(ring):
    for late in range(ring.size):
        if ring.rank == late:
            time.sleep(0.02)
        before = time.time()
        ring.barrier()
        after = time.time()
        spans = [np.frombuffer(r, np.float64) for r in ring.exchange([memoryview(np.array([before, after])).cast("B")])]
        assert min(stop for _, stop in spans) >= max(start for start, _ in spans) - 1e-3


def test_split(ring):
    if launched_by() == "mlx" and ring.size > 1:
        pytest.skip("mx.distributed has none")
    color = [7, -3, 7, None, -3][ring.rank % 5]
    part = ring.split(color)
    members = [rank for rank in range(ring.size) if [7, -3, 7, None, -3][rank % 5] == color]
    if color is None:
        assert part is None
    else:
        with part:
            assert (part.rank, part.size) == (members.index(ring.rank), len(members))
            assert part.all_reduce(mx.array(ring.rank)).item() == sum(members)
    ring.barrier()


def test_split_that_is_not_there(ring):
    if launched_by() != "mlx" or ring.size == 1:
        pytest.skip("it is there")
    for _ in range(2):
        with pytest.raises(RingError, match="split: mx.distributed cannot divide its ranks; use backend 'mpi'"):
            ring.split(ring.rank)
    assert works(ring)


def test_two_rings_at_once(ring):
    with init(timeout=30) as other:
        if ring.size > 1:
            into = [bytearray(1), bytearray(1)]
            sends = [r.send(lambda i=i: [memoryview(bytes([i]))], tag=0) for i, r in enumerate((ring, other))]
            recvs = [r.recv([memoryview(into[i])], tag=0) for i, r in enumerate((ring, other))]
            other.wait(recvs[1], sends[1])
            ring.wait(recvs[0], sends[0])
            assert [bytes(b) for b in into] == [b"\0", b"\1"]
        assert other.all_reduce(mx.array(1)).item() == ring.size == ring.all_reduce(mx.array(1)).item()
    with pytest.raises(RingError, match="closed"):
        other.barrier()
    other.close()


def test_sub_ring_of_given_communicator(ring):
    if launched_by() != "mpi":
        pytest.skip("communicators are MPI's")
    from mpi4py import MPI

    with init(comm=MPI.COMM_SELF, timeout=5) as alone:
        assert (alone.rank, alone.size) == (0, 1)
        assert alone.all_reduce(mx.array(3)).item() == 3


# mistakes


def works(ring) -> bool:
    return ring.all_reduce(mx.array(2)).item() == 2 * ring.size


def test_arguments_that_differ(ring):
    if ring.size == 1:
        pytest.skip("nobody to differ from")
    last = ring.size - 1
    fields = (("scale", "0.5"), ("window", "256" if ring.rank == last else "128"))
    on = "rank 0" if last == 1 else f"ranks {', '.join(map(str, range(last - 1)))} and {last - 1}"
    with pytest.raises(ArgumentError) as caught:
        agree(ring, "ring_attention", fields)
    assert str(caught.value) == f"ring_attention: window differs between ranks: 128 on {on}, 256 on rank {last}"
    assert works(ring)


def test_calls_that_differ(ring):
    if ring.size == 1:
        pytest.skip("nobody to differ from")
    with pytest.raises(ArgumentError, match=r"rank 0 called barrier, .* called all_reduce"):
        ring.barrier() if ring.rank == 0 else ring.all_reduce(mx.array(1))
    assert works(ring)


@pytest.mark.parametrize("size", [10, 100_000])
def test_shapes_that_differ(ring, size):
    if ring.size == 1:
        pytest.skip("nobody to differ from")
    with pytest.raises(ArgumentError, match="all_reduce: shape differs between ranks"):
        ring.all_reduce(mx.zeros(size + (ring.rank == 0)))
    with pytest.raises(ArgumentError, match="all_reduce: dtype differs between ranks: float32 on rank 0, float16 on"):
        ring.all_reduce(mx.zeros(size, mx.float32 if ring.rank == 0 else mx.float16))
    assert works(ring)


def test_error_of_one_rank(ring):
    bad = ring.size - 1
    mine = KeyError("é: my own") if ring.rank == bad else None
    with pytest.raises(KeyError if mine else ArgumentError) as caught:
        agree(ring, "something", error=mine)
    if mine:
        assert caught.value is mine
    else:
        assert str(caught.value) == f"rank {bad}: {KeyError('é: my own')}"
    assert works(ring)


def test_wrong_arguments(ring):
    last = ring.size - 1
    with pytest.raises(ArgumentError, match="x: str, expected an mx.array"):
        ring.all_reduce("x" if ring.rank == last else mx.array(1))
    with pytest.raises(ArgumentError, match="x: NoneType, expected an mx.array"):
        ring.broadcast(None, 0)
    with pytest.raises(ArgumentError, match=f"root: {ring.size}, expected less than {ring.size}"):
        ring.broadcast(mx.array(1), ring.size if ring.rank == last else 0)
    with pytest.raises(ArgumentTypeError, match="color: .red., expected an integer"):
        ring.split("red")
    with pytest.raises(ArgumentError, match="timeout: 0.*, expected a positive"):
        init(timeout=0 if ring.rank == last else 5)
    assert works(ring)


def test_payload_of_agreement(ring):
    replies = agree(ring, "x", (("a", "1"),), payload=[memoryview(bytes(ring.rank)), memoryview(b"!")])
    assert [bytes(reply) for reply in replies] == [bytes(rank) + b"!" for rank in range(ring.size)]


def test_second_thread_gets_an_error(ring):
    caught = []

    def use() -> None:
        try:
            ring.barrier()
        except RingError as error:
            caught.append(str(error))

    with ring.call("ring_attention"):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert caught == ["barrier: this ring is in use by another thread, and a ring runs one call at a time"]
    assert works(ring)


def test_no_gradient_is_better_than_a_wrong_one(ring):
    x = mx.ones((3,))
    with pytest.raises(TransformError, match="all_reduce"):
        mx.grad(lambda x: ring.all_reduce(x).sum())(x)
    with pytest.raises(TransformError, match="all_reduce"):
        mx.vmap(ring.all_reduce)(x)
    assert works(ring)


def test_array_that_cannot_be_evaluated_on_one_rank(ring):
    """The others hear of it in the same call; none goes on to pair this call with the next one."""
    last = ring.size - 1
    for step in range(3):
        x = mx.full((2, 2), 10.0**step)
        if step == 0 and ring.rank == last:
            x = mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu)
        if step == 0:
            with pytest.raises((ValueError, RuntimeError)):
                ring.all_reduce(x)
        else:
            assert ring.all_reduce(x)[0, 0].item() == ring.size * 10.0**step

"""Tests of the messages between GPUs: their rounds, and which rings have them. No GPU is needed."""

from __future__ import annotations

import ctypes

import pytest

from ringattn.errors import RingError
from ringattn.native import cuda
from ringattn.tracing.spans import RESULTS
from ringattn.transport.failures.stall_timer import Moving
from ringattn.transport.gpu import connect
from ringattn.transport.gpu.connect import NO_GPU, Gpu, fit, own_gpu
from ringattn.transport.gpu.links import DeviceLinks
from ringattn.transport.gpu.nccl import ID_BYTES, Nccl, NcclError, Piece
from ringattn.transport.interface import DeviceBuffer, Signal


class Recorder:
    """A network that records its groups; the test says which of them are over."""

    gpu = None

    def __init__(self) -> None:
        self.groups: list[tuple[list[Piece], list[Piece]]] = []
        self.finished = 0
        self.aborted = 0

    def start(self, sends, receives):
        self.groups.append((list(sends), list(receives)))
        return len(self.groups)

    def over(self, token):
        return token <= self.finished

    def check(self):
        pass

    def abort(self):
        self.aborted += 1


def buffers(*sizes: int):
    return lambda: [DeviceBuffer(1000 * size, size, None) for size in sizes]


@pytest.fixture
def network() -> Recorder:
    return Recorder()


@pytest.fixture
def done() -> list:
    return []


@pytest.fixture
def links(network: Recorder, done: list) -> DeviceLinks:
    return DeviceLinks(1, 4, network, done.append)


def test_a_round_waits_until_all_its_messages_can_start(links, network):
    free = Signal()
    links.send(buffers(5, 6), tag=0)
    links.recv(buffers(7), tag=0, after=[free])
    links.advance()
    assert network.groups == []
    free.open()
    links.advance()
    assert network.groups == [([Piece(2, 5000, 5), Piece(2, 6000, 6)], [Piece(0, 7000, 7)])]


def test_a_block_is_passed_on_without_waiting_for_the_host(links, network):
    arrival = links.recv(buffers(1), tag=0)
    links.send(buffers(1), tag=1, after=[arrival])
    links.advance()
    assert len(network.groups) == 2 and not arrival.done


def test_what_must_be_packed_waits_for_the_host(links, network):
    arrival = links.recv(buffers(1), tag=0)
    links.send(buffers(1), tag=1, after=[arrival], late=True)
    links.advance()
    assert len(network.groups) == 1
    network.finished = 1
    links.advance()
    assert len(network.groups) == 2


def test_rounds_have_one_order_on_all_ranks(links, network):
    """Hop by hop, a block before the results of its hop, whatever the order of the calls."""
    ready = Signal()
    links.send(buffers(3), tag=RESULTS + 1, after=[ready])
    links.send(buffers(4), tag=2)
    links.send(buffers(2), tag=1, step=-1)
    links.send(buffers(1), tag=0)
    links.advance()
    assert [sends[0].nbytes for sends, _ in network.groups] == [1, 2]
    ready.open()
    links.advance()
    assert [sends[0].nbytes for sends, _ in network.groups] == [1, 2, 3, 4]
    assert network.groups[1][0][0].peer == 0


def test_finished_messages_are_counted_in_order(links, network, done):
    sent = [links.send(buffers(n + 1), tag=n) for n in range(3)]
    links.advance()
    network.finished = 2
    links.advance()
    assert done == sent[:2] and [message.bytes for message in done] == [1, 2] and not sent[2].done
    assert links.peers == {2}


def test_only_the_oldest_round_is_moving(links):
    links.recv(buffers(9), tag=0)
    links.send(buffers(8), tag=1)
    links.advance()
    assert links.oldest_with(0) == [["gpu recv", 0]] and links.oldest_with(2) == []
    assert links.moving({0: [["gpu recv", 0]]}) == []
    [moving] = links.moving({0: [["gpu send", 0]]})
    assert isinstance(moving, Moving) and (moving.sending, moving.peer, moving.bytes) == (False, 0, 9)


def test_nothing_moves_after_an_abort(links, network):
    links.abort()
    links.abort()
    links.send(buffers(1), tag=0)
    links.advance()
    assert network.aborted == 1 and network.groups == []


@pytest.mark.parametrize(
    ("gpus", "fits"),
    [
        ([Gpu("a", 22809), Gpu("b", 22809)], True),
        ([Gpu("a", 22809)], False),
        ([Gpu("a", 22809), Gpu("a", 22809)], False),
        ([Gpu("a", 22809), Gpu("b", 22703)], False),
        ([Gpu("a", 22809), NO_GPU], False),
    ],
)
def test_which_rings_have_links(gpus, fits):
    assert fit(gpus) == fits


def test_a_switch_turns_nccl_off(monkeypatch):
    class Driver:
        uuid = "a"

    monkeypatch.setattr(connect, "driver", Driver)
    monkeypatch.setattr(Nccl, "__init__", lambda self: None)
    monkeypatch.setattr(Nccl, "version", lambda self: 22809)
    assert own_gpu({}) == Gpu("a", 22809)
    assert own_gpu({"RINGATTN_NCCL": "0"}) == NO_GPU


def test_a_machine_without_a_gpu_has_no_links():
    if cuda.on_gpu():
        pytest.skip("this one has a GPU")
    assert own_gpu({}) == NO_GPU and cuda.driver() is None


def test_an_error_of_nccl_is_one_line(monkeypatch):
    class Library:
        ncclSend = staticmethod(lambda *arguments: 3)  # noqa: N815
        ncclGetErrorString = staticmethod(lambda code: b"internal error")  # noqa: N815

    nccl = Nccl.__new__(Nccl)
    nccl._library = Library()
    with pytest.raises(NcclError, match="ncclSend: internal error .set NCCL_DEBUG=WARN to see why."):
        nccl.call("ncclSend", ctypes.c_int(1))


class _Ring:
    rank, size, timeout = 0, 2, 0.2

    def exchange(self, payload):
        return [bytes(ID_BYTES)] * 2


@pytest.mark.parametrize("why", ["no memory", ""])
def test_ranks_that_do_not_connect(monkeypatch, why):
    """An error of NCCL, or none within the timeout, is an error of the ring that says what to do."""

    def communicator(*arguments):
        if why:
            raise NcclError(why)
        stop.wait(5)

    stop = connect.threading.Event()
    monkeypatch.setattr(connect, "driver", object)
    monkeypatch.setattr(connect, "Communicator", communicator)
    monkeypatch.setattr(Nccl, "__init__", lambda self: None)
    monkeypatch.setattr(Nccl, "new_id", lambda self: bytes(ID_BYTES))

    def wait_until(poll):
        while not poll():
            stop.wait(0.01)

    expected = f"NCCL could not connect the GPUs: {why}" if why else "NCCL did not connect the GPUs within 0.2 s"
    with pytest.raises(RingError, match=f"{expected}; set RINGATTN_NCCL=0"):
        connect.connect(_Ring(), wait_until)
    stop.set()

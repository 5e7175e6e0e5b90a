"""Which rings can use NCCL, and how their GPUs are connected.

A ring can where every rank computes on an NVIDIA GPU of its own. The ranks learn this when the ring opens. They connect
their GPUs in the first call that needs it, because that takes a second and some memory.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ...errors import RingError
from ...native.cuda import CudaError, Driver, driver
from ..interface import Transport
from .nccl import ID_BYTES, Communicator, Nccl, Piece

SWITCH = "RINGATTN_NCCL"  # "0": blocks travel through the host
_REMEDY = f"set {SWITCH}=0 to send blocks through the memory of the hosts"


class Gpu(NamedTuple):
    """A rank's GPU as it introduces itself: its identity, or ``None`` without one, and the version of NCCL."""

    uuid: str | None
    nccl: int


NO_GPU = Gpu(None, 0)


def own_gpu(environment: Mapping[str, str] = os.environ) -> Gpu:
    """Find this rank's GPU; `NO_GPU` where there is none, or the user has turned NCCL off."""
    if environment.get(SWITCH) == "0":
        return NO_GPU
    try:
        own = driver()
        return NO_GPU if own is None else Gpu(own.uuid, Nccl().version())
    except CudaError:
        return NO_GPU


def fit(gpus: Sequence[Gpu]) -> bool:
    """Whether NCCL can connect these GPUs of a ring's ranks."""
    uuids = {gpu.uuid for gpu in gpus}
    return len(gpus) > 1 and None not in uuids and len(uuids) == len(gpus) and len({gpu.nccl for gpu in gpus}) == 1


def agree_on_gpus(ring: Transport) -> bool:
    """Whether NCCL can connect the ranks of `ring`. Collective."""
    replies = ring.exchange([memoryview(json.dumps(own_gpu()).encode())])
    return fit([Gpu(*json.loads(bytes(reply))) for reply in replies])


def connect(ring: Transport, wait_until: Callable[[Callable[[], bool]], None]) -> Communicator:
    """Connect the GPUs of all ranks of `ring`. Collective.

    Args:
        ring: The ring.
        wait_until: Waits until its argument returns ``True``, and raises if the ring breaks first.

    Raises:
        RingError: If a rank could not be connected, or not within the ring's timeout.
    """
    own = driver()
    assert own is not None
    opening = _Opening(own, ring)
    deadline = time.monotonic() + ring.timeout
    wait_until(lambda: opening.over or time.monotonic() > deadline)
    if opening.error is not None:
        raise RingError(f"NCCL could not connect the GPUs: {opening.error}; {_REMEDY}") from opening.error
    if opening.result is None:
        raise RingError(f"NCCL did not connect the GPUs within {ring.timeout:g} s; {_REMEDY}")
    return opening.result


class _Opening:
    """A thread that opens a communicator: nothing can interrupt NCCL there.

    Attributes:
        over: Whether it has ended.
        result: The communicator.
        error: The exception.
    """

    def __init__(self, own: Driver, ring: Transport):
        self.over = False
        self.result: Communicator | None = None
        self.error: BaseException | None = None
        nccl = Nccl()
        unique = nccl.new_id() if ring.rank == 0 else bytes(ID_BYTES)
        unique = bytes(ring.exchange([memoryview(unique)])[0])
        arguments = (nccl, own, unique, ring.rank, ring.size)
        threading.Thread(target=self._run, args=arguments, name="ringattn nccl", daemon=True).start()

    def _run(self, nccl: Nccl, own: Driver, unique: bytes, rank: int, size: int) -> None:
        try:
            result = Communicator(nccl, own, unique, rank, size)
            _greet(result, own, rank, size)
            self.result = result
        except BaseException as error:
            self.error = error
        self.over = True


def _greet(communicator: Communicator, own: Driver, rank: int, size: int) -> None:
    """Exchange a byte with both neighbours: NCCL connects two ranks with their first message, and may wait there."""
    place = own.memory(2)
    for step in (1, -1) if size > 2 else (1,):
        right, left = (rank + step) % size, (rank - step) % size
        token = communicator.start([Piece(right, place, 1)], [Piece(left, place + 1, 1)])
        while not communicator.over(token):
            time.sleep(1e-4)

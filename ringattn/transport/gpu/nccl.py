"""NCCL by ctypes: one communicator, and groups of sends and receives on a stream of its own.

MLX is linked to the same library, so that it is loaded already. https://docs.nvidia.com/deeplearning/nccl
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...native.cuda import CudaError, Driver, Pointer

ID_BYTES = 128
_UINT8 = 1  # ncclUint8
_ABORT_WAIT = 5.0  # s


class NcclError(CudaError):
    """NCCL is missing, or a call of it failed."""


class Piece(NamedTuple):
    """Bytes on this rank's GPU that go to or come from `peer`."""

    peer: int
    address: int
    nbytes: int


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]  # noqa: RUF012


class Nccl:
    """The library."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libnccl.so.2")
        except OSError as error:
            raise NcclError(f"no NCCL: {error}") from None
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function, and raise `NcclError` unless it returns 0."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = (self._library.ncclGetErrorString(code) or b"unknown error").decode()
            raise NcclError(f"{name}: {text} (set NCCL_DEBUG=WARN to see why)")

    def version(self) -> int:
        """Return the version as NCCL encodes it: 22809 for 2.28.9."""
        number = ctypes.c_int()
        self.call("ncclGetVersion", ctypes.byref(number))
        return number.value

    def new_id(self) -> bytes:
        """Make the identity of a communicator, which all its ranks give to `Communicator`."""
        unique = _UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(unique))
        return bytes(memoryview(unique))


class Communicator:
    """A communicator of all ranks of a ring. The constructor waits for all of them and is not interruptible.

    Attributes:
        gpu: This rank's GPU.
    """

    def __init__(self, nccl: Nccl, driver: Driver, unique: bytes, rank: int, size: int):
        self._nccl = nccl
        self.gpu = driver
        self._handle = Pointer()
        self._aborted = False
        driver.use()
        self._stream = driver.stream()
        identity = _UniqueId.from_buffer_copy(unique)
        nccl.call("ncclCommInitRank", ctypes.byref(self._handle), size, identity, rank)

    def start(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Any:
        """Start a group of messages, after all earlier groups. Return a token for `over`."""
        self.gpu.use()
        self._nccl.call("ncclGroupStart")
        for name, pieces in (("ncclSend", sends), ("ncclRecv", receives)):
            for piece in pieces:
                where = Pointer(piece.address), ctypes.c_size_t(piece.nbytes), _UINT8, piece.peer
                self._nccl.call(name, *where, self._handle, self._stream)
        self._nccl.call("ncclGroupEnd")
        return self.gpu.record(self._stream)

    def over(self, token: Any) -> bool:
        """Return whether the messages of a group have left and arrived. Ask no more afterwards."""
        return self.gpu.over(token)

    def check(self) -> None:
        """Raise `NcclError` if a message failed."""
        code = ctypes.c_int()
        self._nccl.call("ncclCommGetAsyncError", self._handle, ctypes.byref(code))
        if code.value:
            raise NcclError(f"NCCL failed in a transfer ({code.value}; set NCCL_DEBUG=WARN to see why)")

    def abort(self) -> None:
        """End all messages that are under way, on this rank. Nothing can be sent afterwards."""
        if self._aborted:
            return
        self._aborted = True
        # A thread of its own, because NCCL may wait for a peer that is gone.
        thread = threading.Thread(target=self._abort, name="ringattn nccl", daemon=True)
        thread.start()
        thread.join(_ABORT_WAIT)

    def _abort(self) -> None:
        self.gpu.use()
        self._nccl.call("ncclCommAbort", self._handle)

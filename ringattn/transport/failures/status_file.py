"""The status file: this process and its launcher exchange what they observe. Either may be killed or blocked.

The launcher makes one file per process and names it in the environment variable ``RINGATTN_STATUS``. The file has
three parts. The first 256 bytes, written here, are one object of JSON, padded with zero bytes, such as::

    {"rank": 2, "size": 4, "call": "ring_attention", "hop": 3}

``call`` is empty before the first call, and ``"after NAME"`` between calls (then ``hop`` is 0). While a process waits
for the others to join it in a ring, ``call`` is ``"init"`` and there is no rank yet. Where the ring broke, ``broken``
is ``"here"`` or ``"elsewhere"`` and says whether this rank was the cause.

The next 16 bytes, written here, are the process id and the time of the monotonic clock by which a thread will write
them again. This thread needs only Python's global interpreter lock: if it is late, a long call keeps the lock.

The rest, written by the launcher, is one counter for each rank of the job, modulo 256. It rises when the launcher sees
that rank compute in such a call: then a missing heartbeat does not mean that the rank is dead.

The file is mapped into memory, so an update costs about a microsecond and survives a SIGKILL.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

LINE_BYTES = 256
PULSE = struct.Struct("=qd")  # the process id; when the thread will write again
FILE_BYTES = 4096
_COUNTERS = LINE_BYTES + PULSE.size
_PULSE_EVERY = 0.2  # s


class Status:
    """The status file of this process; without effect where the launcher asked for none."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._who: tuple[tuple[str, int], ...] = ()
        self._place: tuple[str, int] = ("", 0)
        self._has_pulse = False

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Write that this process waits for the others, until its first ring is open or could not be opened."""
        first = not self._who
        if first:
            self._open()
            self.write("init", 0)
        try:
            yield
        finally:
            if first and not self._who:
                self.write("", 0)

    def opened(self, rank: int, size: int) -> None:
        """Write which rank this process is; the first ring of a process decides."""
        if not self._who:
            self._who = (("rank", rank), ("size", size))
            self._open()
            self.write("", 0)
        if size > 1 and self._map is not None and not self._has_pulse:
            self._has_pulse = True
            threading.Thread(target=self._pulse, args=(self._map,), name="ringattn-pulse", daemon=True).start()

    def _open(self) -> None:
        path = os.environ.get("RINGATTN_STATUS")
        if not path or self._map is not None:
            return
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return  # the variable came from another host, or the launcher has gone: nobody will read it
        with open(descriptor, "r+b") as file:
            found = os.fstat(descriptor)
            # On another host another user may have made a link at that path, also a hard one, to this user's files.
            if (found.st_uid, found.st_nlink) == (os.geteuid(), 1):
                file.truncate(FILE_BYTES)
                self._map = mmap.mmap(descriptor, FILE_BYTES)

    def write(self, what: str, hop: int) -> None:
        """Write the call and the hop that this rank is in."""
        self._place = (what, hop)
        self._put()

    def broken(self, here: bool) -> None:
        """Write that the ring broke, because of this rank or of another."""
        self._put(("broken", "here" if here else "elsewhere"))

    def _put(self, *more: tuple[str, str]) -> None:
        if self._map is not None:
            self._map[:LINE_BYTES] = _encode(*self._who, *zip(("call", "hop"), self._place), *more)

    @staticmethod
    def _pulse(into: mmap.mmap) -> None:
        """Write at a fixed interval that threads of this process get the interpreter lock."""
        while True:
            PULSE.pack_into(into, LINE_BYTES, os.getpid(), time.monotonic() + _PULSE_EVERY)
            time.sleep(_PULSE_EVERY)

    @property
    def job_rank(self) -> int:
        """The rank of this process in the job of a launcher that counts who computes; -1 without one."""
        return -1 if self._map is None else int(os.environ.get("RINGATTN_RANK", "-1"))

    def computing(self, job_rank: int) -> int:
        """The counter of a rank of the job: it rises when the launcher sees that rank compute."""
        place = _COUNTERS + job_rank
        return self._map[place] if self._map is not None and _COUNTERS <= place < FILE_BYTES else 0


@lru_cache(maxsize=1024)  # once per token and layer, the same few again and again
def _encode(*known: tuple[str, object]) -> bytes:
    return json.dumps(dict(known)).encode()[:LINE_BYTES].ljust(LINE_BYTES, b"\0")


status = Status()


class ComputingRanks:
    """Finds ranks that compute although they send no heartbeats, where a launcher reports them.

    Args:
        job_ranks: For each rank, its rank in the launcher's job.
    """

    def __init__(self, job_ranks: Mapping[int, int]):
        self._job_ranks = job_ranks
        self._seen = {rank: status.computing(job_rank) for rank, job_rank in job_ranks.items()}

    def look(self) -> list[int]:
        """The ranks that the launcher has seen to compute since the last look."""
        counters = {rank: status.computing(job_rank) for rank, job_rank in self._job_ranks.items()}
        found = [rank for rank, counter in counters.items() if counter != self._seen[rank]]
        self._seen = counters
        return found

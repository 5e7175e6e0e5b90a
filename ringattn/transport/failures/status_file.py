"""A small file that says where this rank is, for a launcher to read after the process was killed.

The launcher makes one file per process and names it in the environment variable ``RINGATTN_STATUS``. The file holds
256 bytes: one line of ASCII, padded with zero bytes, such as::

    rank=2 size=4 call=ring_attention hop=3

``call`` is ``-`` before the first call, and ``after:NAME`` between calls (then ``hop`` is 0). Names hold no blanks.
While a process waits for the others to join it in a ring, there is ``call=init`` and no rank yet. Where the ring broke,
``broken=here`` or ``broken=elsewhere`` says whether this rank was the cause. The file is mapped into memory, so an
update costs about a microsecond and survives a SIGKILL.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

STATUS_BYTES = 256


class Status:
    """This process's status file, or nothing at all where the launcher asked for none."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._who = self._place = ""

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Say that this process waits for the others, until its first ring is open or could not be opened."""
        first = not self._who
        if first:
            self._open()
            self.write("init", 0)
        try:
            yield
        finally:
            if first and not self._who:
                self.write("-", 0)

    def opened(self, rank: int, size: int) -> None:
        """Say which rank this process is; the first ring of a process decides."""
        if not self._who:
            self._who = f"rank={rank} size={size} "
            self._open()
            self.write("-", 0)

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
            # On another host somebody else may have put something at that path: a link, also a hard one, to our files.
            if (found.st_uid, found.st_nlink) == (os.geteuid(), 1):
                file.truncate(STATUS_BYTES)
                self._map = mmap.mmap(descriptor, STATUS_BYTES)

    def write(self, what: str, hop: int) -> None:
        """Where this rank is."""
        self._place = f"{self._who}call={what.replace(' ', ':')} hop={hop}"
        self._put(self._place)

    def broken(self, here: bool) -> None:
        """Say that the ring broke, because of this rank or of another."""
        self._put(f"{self._place} broken={'here' if here else 'elsewhere'}")

    def _put(self, line: str) -> None:
        if self._map is not None:
            self._map[:] = f"{line}\n".encode("ascii", "replace")[:STATUS_BYTES].ljust(STATUS_BYTES, b"\0")


status = Status()

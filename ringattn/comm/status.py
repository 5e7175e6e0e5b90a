"""A small file that says where this rank is, for a launcher to read after the process was killed.

The launcher makes one file per process and names it in the environment variable ``RINGATTN_STATUS``. The file holds
256 bytes: one line of ASCII, padded with zero bytes, such as::

    rank=2 size=4 call=ring_attention hop=3

``call`` is ``-`` before the first call, and ``after:NAME`` between calls (then ``hop`` is 0). Names hold no blanks.
It is mapped into memory, so an update costs about a microsecond and survives a SIGKILL.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

STATUS_BYTES = 256


class Status:
    """This process's status file, or nothing at all where the launcher asked for none."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._who = ""

    def open(self, rank: int, size: int) -> None:
        """Say which rank this process is; the first ring of a process decides."""
        path = os.environ.get("RINGATTN_STATUS")
        if not path or self._map is not None:
            return
        try:
            with Path(path).open("r+b") as file:
                file.truncate(STATUS_BYTES)
                self._map = mmap.mmap(file.fileno(), STATUS_BYTES)
        except OSError:
            return  # the variable came from another host, or the launcher has gone: nobody will read it
        self._who = f"rank={rank} size={size}"
        self.write("-", 0)

    def write(self, what: str, hop: int) -> None:
        if self._map is not None:
            line = f"{self._who} call={what.replace(' ', ':')} hop={hop}\n"
            self._map[:] = line.encode("ascii", "replace")[:STATUS_BYTES].ljust(STATUS_BYTES, b"\0")


status = Status()

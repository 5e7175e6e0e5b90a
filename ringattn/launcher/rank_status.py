"""A rank's status file, as its wrapper makes, reads and writes it. Standard library only.

`ringattn.transport.failures.status_file` describes the content.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import time
from contextlib import suppress
from typing import Any

from .processes import cpu_time

LINE_BYTES = 256  # this and the next two as in ringattn.transport.failures.status_file, which imports MLX
PULSE = struct.Struct("=qd")
FILE_BYTES = 4096
CHECK_EVERY = 0.5  # s between two checks of the program
_BUSY = 0.05  # of a core's time; threads that only wait for the interpreter lock were seen to use 0.004


def make_status_file(folder: str) -> str:
    """Make a file of `FILE_BYTES` that only this user can reach, in `folder` if no other user can write there.

    `folder` is the launcher's. It is absent on other hosts, where another user may have made one of the same name.
    """
    if not _is_private(folder):
        folder = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"ringattn-{os.urandom(8).hex()}")
        os.mkdir(folder, 0o700)
    path = os.path.join(folder, f"{os.urandom(8).hex()}.status")
    made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(made, "wb") as file:
        file.write(bytes(FILE_BYTES))
    return path


def _is_private(folder: str) -> bool:
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def remove_status_file(path: str, folder: str) -> None:
    """Remove a status file, and its folder if that is not the launcher's."""
    with suppress(OSError):
        os.unlink(path)
        if os.path.dirname(path) != folder:
            os.rmdir(os.path.dirname(path))


def parse_status(status: bytes) -> dict[str, Any]:
    """Read the JSON object in a status file; empty if there is none."""
    try:
        known = json.loads(status[:LINE_BYTES].rstrip(b"\0"))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


class Pulse:
    """A check whether the program computes in a call that keeps the interpreter lock, and so sends no heartbeats."""

    def __init__(self) -> None:
        self.late: tuple[float, float, float] | None = None  # when it was due; the time and the cpu time of a check

    def is_kept_late(self, status: bytes) -> bool:
        """Whether the pulse is late, and the program has computed since an earlier check of the same state.

        A program that is stopped, or blocked with the lock, does not compute, and counts as dead.
        """
        pid, due = PULSE.unpack_from(status, LINE_BYTES)
        now = time.monotonic()
        used = cpu_time(pid) if 0 < due < now else None
        if used is None:
            self.late = None
        elif self.late is None or self.late[0] != due:
            self.late = due, now, used
        elif now - self.late[1] >= CHECK_EVERY:
            _, then, before = self.late
            self.late = due, now, used
            return used - before > _BUSY * (now - then)
        return False

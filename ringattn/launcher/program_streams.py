"""Standard streams of a rank's program: output with the rank before each line, input from the launcher.

Standard library only.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import suppress

_QUIET = 0.3  # s without the rest of a line
_PART = 1 << 16  # bytes that are read at once
_LONGEST_LINE = 1 << 16  # bytes of an unfinished line that are held back


class Prefixer:
    """A filter that puts a text before each line of a stream, in time and memory independent of the lines' lengths."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._held = bytearray()  # the beginning of a line
        self._in_line = False  # whether a part of the line has been returned, and its prefix with it

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def feed(self, part: bytes) -> bytes:
        """Take a part of the stream; return whole lines, and the beginning of a line longer than `_LONGEST_LINE`."""
        begin = len(self._held)
        self._held += part
        end = self._held.rfind(b"\n", begin) + 1
        if len(self._held) - end >= _LONGEST_LINE:
            end = len(self._held)
        return self._mark(end)

    def flush(self) -> bytes:
        """Return the part of a line that is held."""
        return self._mark(len(self._held))

    def _mark(self, end: int) -> bytes:
        text = bytes(self._held[:end])
        del self._held[:end]
        if not text:
            return b""
        before = b"" if self._in_line else self._prefix
        self._in_line = not text.endswith(b"\n")
        return before + text[:-1].replace(b"\n", b"\n" + self._prefix) + text[-1:]


class Outputs:
    """Standard output and error of the program, passed on line by line with the rank before each line."""

    def __init__(self, rank: str) -> None:
        self.before = f"[{rank}] ".encode()
        self.pipes = {descriptor: os.pipe() for descriptor in (1, 2)}
        self.threads = [threading.Thread(target=self.pass_on, args=(one,), daemon=True) for one in self.pipes]

    def become(self) -> None:
        """Redirect output to the pipes, in the program's process."""
        for descriptor, (_, writing) in self.pipes.items():
            os.dup2(writing, descriptor)

    def start(self) -> None:
        for _, writing in self.pipes.values():
            os.close(writing)
        for thread in self.threads:
            thread.start()

    def pass_on(self, descriptor: int) -> None:
        """Pass on whole lines; after `_QUIET` seconds also an unfinished line, such as a question."""
        reading = self.pipes[descriptor][0]
        lines = Prefixer(self.before)
        while True:
            quiet = lines.holds and not select.select([reading], [], [], _QUIET)[0]
            part = b"" if quiet else os.read(reading, _PART)
            with suppress(OSError):  # the reader is gone
                _write(descriptor, lines.feed(part) if part else lines.flush())
            if not part and not quiet:
                return

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(_QUIET * 4)  # a process that the program left behind may hold the pipe open


class Input:
    """Standard input of rank 0's program: a pipe that is filled from a connection to the launcher."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.reading, self.writing = os.pipe()

    def become(self) -> None:
        """Redirect input to the pipe, in the program's process."""
        os.dup2(self.reading, 0)

    def start(self) -> None:
        os.close(self.reading)
        threading.Thread(target=self.pass_on, daemon=True).start()

    def pass_on(self) -> None:
        try:
            with self.link:
                while part := self.link.recv(_PART):
                    _write(self.writing, part)
        except OSError:
            return  # the program reads no more; or the launcher is lost, which does not end the input
        os.close(self.writing)


def _write(descriptor: int, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[os.write(descriptor, left) :]

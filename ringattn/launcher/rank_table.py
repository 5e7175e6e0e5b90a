"""The launcher's table of ranks, from the reports of their wrappers."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..rendezvous.channel import Channel, ProtocolError, take
from ..rendezvous.client import format_endpoint
from ..rendezvous.handshake import make_key
from ..rendezvous.keepalive import keep_alive
from ..rendezvous.listener import Listener
from ..transport.failures.cause import Cause
from .processes import signal_group, start_time
from .rank_wrapper import DEFAULT_TIMEOUT
from .standard_input import StandardInput, own_descriptor

_STATUS_TYPES = {
    "rank": int,
    "call": str,
    "hop": int,
    "broken": str,
}  # of the values in a status file that are read here


@dataclass(frozen=True)
class Process:
    """A process, identified by pid and start time: the system may give the pid alone to another process later."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether it runs or is stopped; a zombie is dead."""
        return bool(self.started) and start_time(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Send a signal to it and the group that it leads."""
        if self.alive:
            signal_group(self.pid, number)

    def kill_group(self) -> None:
        """Kill it and all processes of its group."""
        if start_time(self.pid) in (None, self.started):  # the pid of a dead leader stays taken while its group lives
            signal_group(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class End:
    """The end of a rank's program.

    Attributes:
        cause: How it ended, with its exit code.
        time: When the launcher got the report, in seconds of ``time.monotonic()``.
        asked: Whether a signal from MPI or the launcher asked for it: then it is no failure.
        consequence: Whether another rank had broken the ring before.
    """

    cause: Cause
    time: float
    asked: bool
    consequence: bool

    @property
    def code(self) -> int:
        """The exit code; negative for a signal."""
        return self.cause.exit_code

    @property
    def status(self) -> int:
        """The exit code as a shell would give it."""
        return self.code if self.code >= 0 else 128 - self.code


class Connection:
    """The launcher's side of the connection to one wrapper."""

    def __init__(self, link: socket.socket, timeout: float):
        link.setblocking(False)
        keep_alive(link, timeout)
        self._link = link
        self._channel = Channel(link)
        self.open = True
        self.broken = False  # closed here, because the wrapper's host is out of reach or it sent a wrong message
        # A process of this machine that connects to one of its addresses has the same address.
        self.local = link.getpeername()[0] == link.getsockname()[0]

    def next(self) -> Any:
        """The next message that has arrived, or ``None``; `open` tells whether more may arrive."""
        try:
            self._channel.flush()
            while self.open:
                if (message := self._channel.next()) is not None:
                    return message
                self.open = self._channel.read()
        except BlockingIOError:
            pass
        except OSError:
            self.give_up()
        return None

    def send(self, **what: object) -> None:
        """Send a message; do nothing if the wrapper is gone."""
        with suppress(OSError):
            self._channel.send(what)

    def release(self) -> None:
        """Close this side: the wrapper ends its rank and itself, and then `open` turns false."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)

    def give_up(self) -> None:
        """Close it because of an error."""
        self.open = False
        self.broken = True
        self._link.close()

    def close(self) -> None:
        self._link.close()

    def detach(self) -> socket.socket:
        """Return the socket, for another use than messages."""
        return self._link


@dataclass
class RankEntry:
    """One rank that has reported. The launcher signals its processes on this host; on others its wrapper does so."""

    number: str
    host: str
    wrapper: Process
    child: Process
    connection: Connection
    end: End | None = None
    stopped: bool = False
    computing: bool = False  # its wrapper has just seen it compute without heartbeats
    opening_since: float | None = None  # when it began to wait for the others to open a ring, if it waits
    missing_since: float | None = None  # when its wrapper was first seen dead without having reported its end

    def __str__(self) -> str:
        notes = [] if self.connection.local else [self.host]
        notes += ["stopped"] if self.stopped else []
        return f"{self.number} ({', '.join(notes)})" if notes else self.number

    @property
    def here(self) -> list[Process]:
        """Its processes, if they are on this machine."""
        return [self.child, self.wrapper] if self.connection.local else []

    @property
    def watched(self) -> bool:
        """Whether its wrapper is alive."""
        return self.wrapper.alive if self.connection.local else self.connection.open

    @property
    def lost(self) -> bool:
        """Whether its host is out of reach."""
        return self.connection.broken and not self.connection.local

    @property
    def left(self) -> bool:
        """Whether all its processes have ended, as far as this machine can tell."""
        return not any(process.alive for process in self.here) if self.connection.local else not self.connection.open

    def signal(self, number: int) -> None:
        """Send a signal to its program and the group that it leads."""
        if self.connection.local:
            self.child.signal(number)
        else:
            self.connection.send(signal=int(number))

    def kill(self) -> None:
        """Kill its program and all processes of its group."""
        if self.connection.local:
            self.child.kill_group()
        else:
            self.connection.send(signal=int(signal.SIGKILL))

    def read(self) -> None:
        """Handle all received messages of its wrapper."""
        while (message := self.connection.next()) is not None:
            try:
                self._handle(message)
            except ProtocolError:
                self.connection.give_up()

    def _handle(self, message: Any) -> None:
        if "stopped" in message:
            self.stopped = take(message, "stopped", bool)
        elif "opening" in message:
            self.opening_since = time.monotonic() if take(message, "opening", bool) else None
        elif "computing" in message:
            self.computing = True
        elif "ended" in message and self.end is None:
            self.end = self._read_end(message)
            self.stopped = False

    def _read_end(self, message: Any) -> End:
        code = take(message, "ended", int)
        status = take(message, "known", dict)  # from a file that the program could write to
        known = {name: value for name, value in status.items() if type(value) is _STATUS_TYPES.get(name)}
        try:
            cause = Cause.of_end(self.number, self.host, code, known)
        except ValueError as error:
            raise ProtocolError(f"ended: {error}") from None
        return End(cause, time.monotonic(), take(message, "asked", bool), known.get("broken") == "elsewhere")


class RankTable(dict[str, RankEntry]):
    """The ranks that have reported, by number, and the listener for the others.

    Args:
        addresses: The addresses of this machine at which ranks can reach it.
        timeout: Seconds without an answer after which a host counts as lost.

    Attributes:
        endpoint: The addresses and the key with which a wrapper connects. It holds a secret.
    """

    def __init__(self, addresses: Sequence[str], timeout: float = DEFAULT_TIMEOUT):
        super().__init__()
        self._timeout = timeout
        self._pending: dict[Connection, str] = {}  # connected, but not reported
        self._input: StandardInput | None = None
        key = make_key()
        self._listener = Listener(list(dict.fromkeys(addresses)), lambda rank: key)
        self.endpoint = format_endpoint(self._listener.addresses, key)

    def read(self) -> None:
        """Handle all new connections and received messages."""
        while caller := self._listener.accept(0):
            with suppress(OSError):  # the caller is gone already
                self._pending[Connection(caller[1], self._timeout)] = str(caller[0])
        for connection, number in list(self._pending.items()):
            if self._admit(connection, number):
                del self._pending[connection]
        for rank in self.values():
            rank.read()
            if rank.computing:
                rank.computing = False
                for other in self.values():
                    other.connection.send(computing=int(rank.number))

    def close(self) -> None:
        self._listener.close()
        if self._input is not None:
            self._input.close()
        for connection in [*self._pending, *(rank.connection for rank in self.values())]:
            connection.close()

    def _admit(self, connection: Connection, number: str) -> bool:
        """Enter a rank once its wrapper has reported its processes; whether `connection` is no longer pending."""
        message = connection.next()
        if message is None:
            return not connection.open
        if "input" in message and self._input is None:
            self._input = StandardInput(connection.detach(), own_descriptor())
            return True
        try:
            wrapper, child = (_read_process(one) for one in take(message, "processes", list))
            self[number] = RankEntry(number, take(message, "host", str), wrapper, child, connection)
        except (ProtocolError, ValueError):
            connection.give_up()
        return True


def _read_process(pair: Any) -> Process:
    """Read a process from ``[pid, start time]``. Refuse other numbers than pids: a signal to them may reach groups."""
    if isinstance(pair, list) and len(pair) == 2:
        pid, started = pair
        if type(pid) is int and 1 < pid < 1 << 31 and isinstance(started, str):
            return Process(pid, started)
    raise ProtocolError("process: expected a number above 1 and a start time")

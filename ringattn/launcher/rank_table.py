"""What the launcher knows of each rank, from what its wrapper says over the connection between them."""

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


@dataclass(frozen=True)
class Process:
    """A process that no other can be mistaken for: a pid may be given out again, but not with the same start time."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether it still runs or is stopped; a zombie is dead."""
        return bool(self.started) and start_time(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Signal it and the group that it leads."""
        if self.alive:
            signal_group(self.pid, number)

    def kill_group(self) -> None:
        """Kill it, and what it has started and left behind in its group."""
        if start_time(self.pid) in (None, self.started):  # a group keeps its dead leader's pid from being given out
            signal_group(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class End:
    """How a rank's program ended.

    Attributes:
        code: The exit code; negative for a signal.
        time: When the launcher heard of it, in seconds of ``time.monotonic()``.
        asked: Whether a signal from MPI or the launcher asked for it, so that it is not the cause of anything.
        caused: Whether another rank broke the ring before, so that this is what came of it.
        line: One line for people.
    """

    code: int
    time: float
    asked: bool
    caused: bool
    line: str

    @property
    def status(self) -> int:
        """The exit code as a shell would give it."""
        return self.code if self.code >= 0 else 128 - self.code


class Connection:
    """The launcher's side of the connection to one wrapper."""

    def __init__(self, link: socket.socket, timeout: float):
        link.setblocking(False)
        keep_alive(link, timeout)
        self._link, self._channel = link, Channel(link)
        self.open = True
        self.broken = False  # not closed by the wrapper, but given up: its host is out of reach, or speaks nonsense
        # Whoever connects to an address of this machine from this machine has it itself.
        self.local = link.getpeername()[0] == link.getsockname()[0]

    def next(self) -> Any:
        """The next message that has come, if one has; `open` says whether more may come."""
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

    def say(self, **what: object) -> None:
        """Send a message; to a wrapper that is gone it goes nowhere."""
        with suppress(OSError):
            self._channel.send(what)

    def let_go(self) -> None:
        """The end of the leash: the wrapper ends its rank and leaves, and then `open` turns false."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)

    def give_up(self) -> None:
        """Close it because nothing more can be made of it."""
        self.open, self.broken = False, True
        self._link.close()

    def close(self) -> None:
        self._link.close()

    def detach(self) -> socket.socket:
        """The socket, for another use than messages."""
        return self._link


@dataclass
class Rank:
    """One rank as far as it is known. Its processes are signalled directly here, and elsewhere by its wrapper."""

    number: str
    host: str
    wrapper: Process
    child: Process
    connection: Connection
    end: End | None = None
    stopped: bool = False
    computing: bool = False  # its wrapper has just seen it compute although it sends no heartbeats
    opening_since: float | None = None  # when it began to wait for the others to open a ring, if it does
    missing_since: float | None = None  # when its wrapper was first seen dead, without a word about its end

    def __str__(self) -> str:
        notes = [] if self.connection.local else [self.host]
        notes += ["stopped"] if self.stopped else []
        return f"{self.number} ({', '.join(notes)})" if notes else self.number

    @property
    def here(self) -> list[Process]:
        """Its processes, as far as they are this machine's."""
        return [self.child, self.wrapper] if self.connection.local else []

    @property
    def watched(self) -> bool:
        """Whether its wrapper is there."""
        return self.wrapper.alive if self.connection.local else self.connection.open

    @property
    def lost(self) -> bool:
        """Whether its host cannot be reached any more."""
        return self.connection.broken and not self.connection.local

    @property
    def left(self) -> bool:
        """Whether nothing of it is there any more, as far as this machine can tell."""
        return not any(process.alive for process in self.here) if self.connection.local else not self.connection.open

    def signal(self, number: int) -> None:
        """Signal its program and the group that it leads."""
        if self.connection.local:
            self.child.signal(number)
        else:
            self.connection.say(signal=int(number))

    def kill(self) -> None:
        """Kill its program, and what that has left behind."""
        if self.connection.local:
            self.child.kill_group()
        else:
            self.connection.say(signal=int(signal.SIGKILL))

    def hear(self) -> None:
        """Take in what its wrapper has said."""
        while (message := self.connection.next()) is not None:
            try:
                self._take(message)
            except ProtocolError:
                self.connection.give_up()

    def _take(self, message: Any) -> None:
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
        said = take(message, "known", dict)  # from a file that the program could write to
        known = {name: value for name, value in said.items() if isinstance(value, (str, int))}
        try:
            line = str(Cause.of_end(self.number, self.host, code, known))
        except ValueError as error:
            raise ProtocolError(f"ended: {error}") from None
        return End(code, time.monotonic(), take(message, "asked", bool), known.get("broken") == "elsewhere", line)


class Ranks(dict[str, Rank]):
    """The ranks that have reported, by number, and where others are expected.

    Args:
        addresses: The addresses of this machine at which ranks can reach it.
        timeout: Seconds without a sign of life after which a host counts as gone.

    Attributes:
        endpoint: What a wrapper needs for its way here. It holds a secret.
    """

    def __init__(self, addresses: Sequence[str], timeout: float = DEFAULT_TIMEOUT):
        super().__init__()
        self._timeout = timeout
        self._coming: dict[Connection, str] = {}  # without a word yet
        self._input: StandardInput | None = None
        key = make_key()
        self._listener = Listener(list(dict.fromkeys(addresses)), lambda rank: key)
        self.endpoint = format_endpoint(self._listener.addresses, key)

    def hear(self) -> None:
        """Take in what has been said since the last time."""
        while caller := self._listener.accept(0):
            with suppress(OSError):  # it has gone already
                self._coming[Connection(caller[1], self._timeout)] = str(caller[0])
        for connection, number in list(self._coming.items()):
            if self._admit(connection, number):
                del self._coming[connection]
        for rank in self.values():
            rank.hear()
            if rank.computing:
                rank.computing = False
                for other in self.values():
                    other.connection.say(computing=int(rank.number))

    def close(self) -> None:
        self._listener.close()
        if self._input is not None:
            self._input.close()
        for connection in [*self._coming, *(rank.connection for rank in self.values())]:
            connection.close()

    def _admit(self, connection: Connection, number: str) -> bool:
        """Make a rank of a wrapper once it has said what it runs; whether that is decided."""
        message = connection.next()
        if message is None:
            return not connection.open
        if "input" in message and self._input is None:
            self._input = StandardInput(connection.detach(), own_descriptor())
            return True
        try:
            wrapper, child = (_read_process(one) for one in take(message, "processes", list))
            self[number] = Rank(number, take(message, "host", str), wrapper, child, connection)
        except (ProtocolError, ValueError):
            connection.give_up()
        return True


def _read_process(told: Any) -> Process:
    """The process of ``[pid, start time]``. No other number may be signalled: some stand for groups."""
    if isinstance(told, list) and len(told) == 2:
        pid, started = told
        if type(pid) is int and 1 < pid < 1 << 31 and isinstance(started, str):
            return Process(pid, started)
    raise ProtocolError("process: expected a number above 1 and a start time")

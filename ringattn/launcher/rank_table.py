"""What the launcher knows of each rank, from what its wrapper says over the connection between them."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..transport.failures.cause import Cause
from ..transport.mlx.bootstrap import own_address_towards
from .rank_wrapper import DEFAULT_TIMEOUT, keep_alive, signal_group, start_time
from .standard_input import StandardInput, own_descriptor

PATIENCE = 5.0  # s for whoever connects to say who it is
LONGEST = 1 << 16  # bytes of a line


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
        self._link, self._rest = link, b""
        self.open = True
        self.broken = False  # not closed by the wrapper, but given up by the system: its host is out of reach
        self.since = time.monotonic()
        # Whoever connects to an address of this machine from this machine has it itself.
        self.local = link.getpeername()[0] == link.getsockname()[0]

    def next(self) -> bytes | None:
        """The next line that has come, if one has; `open` says whether more may come."""
        try:
            while self.open and b"\n" not in self._rest and len(self._rest) < LONGEST:
                part = self._link.recv(4096)
                self.open = bool(part)
                self._rest += part
        except BlockingIOError:
            pass
        except OSError:
            self.open, self.broken = False, True
        line, end, rest = self._rest.partition(b"\n")
        self._rest = rest if end else line
        return line if end else None

    def say(self, line: str) -> None:
        with suppress(OSError):
            self._link.sendall(line.encode() + b"\n")

    def let_go(self) -> None:
        """The end of the leash: the wrapper ends its rank and leaves, and then `open` turns false."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._link.close()

    def detach(self) -> socket.socket:
        """The socket, for another use than lines."""
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
            self.connection.say(f"signal {int(number)}")

    def kill(self) -> None:
        """Kill its program, and what that has left behind."""
        if self.connection.local:
            self.child.kill_group()
        else:
            self.connection.say(f"signal {int(signal.SIGKILL)}")

    def hear(self) -> None:
        """Take in what its wrapper has said."""
        while (line := self.connection.next()) is not None:
            said = json.loads(line)
            if "stopped" in said:
                self.stopped = said["stopped"]
            elif "opening" in said:
                self.opening_since = time.monotonic() if said["opening"] else None
            elif "computing" in said:
                self.computing = True
            elif "ended" in said and self.end is None:
                cause = Cause.of_end(self.number, self.host, said["ended"], said["known"])
                caused = said["known"].get("broken") == "elsewhere"
                self.end = End(said["ended"], time.monotonic(), said["asked"], caused, str(cause))
                self.stopped = False


class Ranks(dict[str, Rank]):
    """The ranks that have reported, by number, and the sockets at which others are expected.

    Args:
        addresses: The addresses of this machine at which ranks can reach it.
        timeout: Seconds without a sign of life after which a host counts as gone.
    """

    def __init__(self, addresses: Sequence[str], timeout: float = DEFAULT_TIMEOUT):
        super().__init__()
        self._timeout = timeout
        self._token = secrets.token_hex(16)
        self._coming: list[Connection] = []
        self._input: StandardInput | None = None
        self._doors = []
        for address in dict.fromkeys(addresses):
            door = socket.create_server((address, 0), backlog=256)
            door.setblocking(False)
            self._doors.append(door)

    @property
    def told(self) -> str:
        """What a wrapper needs for its way here: addresses with ports, and the token that it shows."""
        return " ".join([*(f"{a},{p}" for a, p in (door.getsockname()[:2] for door in self._doors)), self._token])

    def hear(self) -> None:
        """Take in what has been said since the last time."""
        for door in select.select(self._doors, [], [], 0)[0] if self._doors else ():
            with suppress(OSError):
                self._coming.append(Connection(door.accept()[0], self._timeout))
        self._coming = [connection for connection in self._coming if not self._admit(connection)]
        for rank in self.values():
            rank.hear()
            if rank.computing:
                rank.computing = False
                for other in self.values():
                    other.connection.say(f"computing {rank.number}")

    def close(self) -> None:
        for door in self._doors:
            door.close()
        if self._input is not None:
            self._input.close()
        for connection in [*self._coming, *(rank.connection for rank in self.values())]:
            connection.close()

    def _admit(self, connection: Connection) -> bool:
        """Make a rank of whoever shows the token; whether that is decided."""
        line = connection.next()
        if line is not None:
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(line)
                if hmac.compare_digest(str(said["token"]), self._token):
                    if "input" in said and self._input is None:
                        self._input = StandardInput(connection.detach(), own_descriptor())
                        return True
                    wrapper, child = (Process(int(pid), started) for pid, started in said["processes"])
                    self[said["rank"]] = Rank(said["rank"], said["host"], wrapper, child, connection)
                    return True
        if line is not None or not connection.open or time.monotonic() - connection.since > PATIENCE:
            connection.close()
            return True
        return False


def own_addresses(hosts: Sequence[str]) -> list[str]:
    """The addresses of this machine from which its ways to `hosts` begin; where there are none, its own to itself."""
    return list(dict.fromkeys(filter(None, map(own_address_towards, hosts)))) or ["127.0.0.1"]


def is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, 0)[0]
        with socket.socket(family) as probe:
            probe.bind(address)  # works with one's own addresses alone
            return True
    return host in ("localhost", os.uname().nodename)

"""What every rank runs under: starts the program, stays beside it, and tells the launcher how it ended.

Run by path, ``python -IS rank.py -- COMMAND...``, so that a rank pays little for it and no library is imported.
mpiexec starts it, on whatever host; it connects to the launcher as ``RINGATTN_LAUNCHER`` says, both prove who they are
(see `rendezvous`), and it tells the launcher in messages, each a JSON object:

    {"host", "processes": [[pid, start time], [pid, start time]]}       of this process and the program; the first one
    {"stopped": true}                               or false: the program was stopped (SIGSTOP) or goes on
    {"opening": true}                               or false: it waits for the others to open a ring, or does no longer
    {"computing": true}                             the program computes in a call that holds its heartbeats up
    {"ended": code, "asked": false, "known": {}}    whether a signal that came through here asked for it, and what the
                                                    status file said

Rank 0 opens a second connection, on which it says ``{"input": true}``, and gets the launcher's standard input.

The launcher answers with a message for each signal that the program is to get, ``{"signal": 15}``, and for each rank
that computes so, ``{"computing": 3}``, of which the library is told. The connection is a leash as well: when the
launcher lets go of it, or dies, everything here ends. The library keeps its place in a file of this host that
``RINGATTN_STATUS`` names; `ringattn.transport.failures.status_file` says what is in it.

This process outlives the program until the launcher lets go. If it left at once, MPI would kill the other ranks before
they could say what happened to them, and MPICH's proxy would spin on the closed connection for as long as others run.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

if __name__ == "__main__":  # run by path: an empty package in place of ringattn, whose __init__ imports MLX
    _ringattn = types.ModuleType("ringattn")
    _ringattn.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["ringattn"] = _ringattn

from ringattn.rendezvous.channel import Channel, take  # noqa: E402
from ringattn.rendezvous.client import connect, parse_endpoint  # noqa: E402

LINE_BYTES = 256  # of the status file, as in ringattn.transport.failures.status_file; so are the next two
PULSE = struct.Struct("=qd")
FILE_BYTES = 4096
FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
DEFAULT_TIMEOUT = 60.0  # s, the ring's
_QUIET = 0.3  # s without the rest of a line
_PART = 1 << 16  # bytes that are read at once
_LONGEST_LINE = 1 << 16  # bytes of an unfinished line that are held back
_LAST_WORDS = 3  # s for the launcher's host to confirm that it has heard how the program ended
_LOOK_AROUND = 0.5  # seconds between looks at the parent and the program; everything else wakes the wait by itself
_BUSY = 0.05  # of a core's time; threads that only wait for the interpreter lock were seen to use 0.004


def start_time(pid: int) -> str | None:
    """When the process `pid` started, in the system's own words, or ``None`` where none runs (a zombie does not).

    A pid together with its start time names a process for good; the pid alone may be given to another one later.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # the name before it may hold spaces and parentheses
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    import subprocess  # here: Linux ranks need not pay for it

    shown = subprocess.run(["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not started or state.startswith("Z") else started.strip()


def cpu_time(pid: int) -> float | None:
    """Seconds of computing that all threads of the process `pid` have done, or ``None`` where none runs."""
    if sys.platform == "linux":
        try:
            return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) names this clock
        except OSError:
            return None
    import subprocess

    shown = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True)
    parts = shown.stdout.strip().split(":")  # minutes:seconds.hundredths
    return sum(float(part) * 60**power for power, part in enumerate(reversed(parts))) if all(parts) else None


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group that `pid` leads, or to it alone where it leads none; to nobody is fine."""
    for send in (os.killpg, os.kill):
        try:
            send(pid, number)
            return
        except OSError:
            continue


def parse_status(status: bytes) -> dict[str, Any]:
    """What a rank's library has left in its status file; empty where it has left nothing that can be read."""
    try:
        known = json.loads(status[:LINE_BYTES].rstrip(b"\0"))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def unescape(argument: str) -> str:
    """The argument as the user gave it: mpiexec takes a bare ``:`` for itself, so it travels as ``\\:``."""
    return argument[1:] if argument[:1] == "\\" and argument.lstrip("\\") == ":" else argument


def give_up_after(link: socket.socket, seconds: int) -> None:
    """Have the system end a connection on which nobody confirms for that long what was sent."""
    options = {"linux": (getattr(socket, "TCP_USER_TIMEOUT", 18), 1000 * seconds), "darwin": (0x80, seconds)}
    if sys.platform in options:  # on a Mac TCP_RXT_CONNDROPTIME, which Python does not name
        link.setsockopt(socket.IPPROTO_TCP, *options[sys.platform])


def keep_alive(link: socket.socket, seconds: float) -> None:
    """Have the system end a connection whose other host is out of reach that long; a stopped process still answers."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    steps = max(1, round(seconds / 4))
    for name, value in ((idle, steps), ("TCP_KEEPINTVL", steps), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    give_up_after(link, 4 * steps)  # nothing is asked of the other side while something is on its way there


def timeout_of(environment: Mapping[str, str]) -> float:
    """Seconds without a sign of life after which a host counts as gone, as for the ring; at least 2."""
    try:
        return max(2.0, float(environment.get("RINGATTN_TIMEOUT") or DEFAULT_TIMEOUT))
    except ValueError:
        return DEFAULT_TIMEOUT  # the ring will say what is wrong with it


def connect_launcher(endpoint: str, rank: str) -> socket.socket:
    """The connection to the launcher; `OSError` or `ValueError` where there is none."""
    addresses, key = parse_endpoint(endpoint)
    link = connect(addresses, key, int(rank))
    keep_alive(link, timeout_of(os.environ))
    return link


def make_status_file(folder: str) -> str:
    """A new file of `FILE_BYTES` that only this user can reach, in `folder` if nobody else can write there.

    That is the launcher's, which other hosts have not; there somebody else may have made one of the same name.
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
    """Remove it, with its folder where that is not the launcher's."""
    with suppress(OSError):
        os.unlink(path)
        if os.path.dirname(path) != folder:
            os.rmdir(os.path.dirname(path))


class Prefixer:
    """Put a text before each line of a stream of bytes, in time and memory that do not depend on the lines' lengths."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._held = bytearray()  # the beginning of a line
        self._in_line = False  # whether a part of the line has been returned, and its prefix with it

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def feed(self, part: bytes) -> bytes:
        """Take a part of the stream and return whole lines, and what there is of one longer than `_LONGEST_LINE`."""
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
    """What the program prints, passed on line by line with the rank before each."""

    def __init__(self, rank: str) -> None:
        self.before = f"[{rank}] ".encode()
        self.pipes = {descriptor: os.pipe() for descriptor in (1, 2)}
        self.threads = [threading.Thread(target=self.pass_on, args=(one,), daemon=True) for one in self.pipes]

    def become(self) -> None:
        """In the program's process: print into the pipes."""
        for descriptor, (_, writing) in self.pipes.items():
            os.dup2(writing, descriptor)

    def start(self) -> None:
        for _, writing in self.pipes.values():
            os.close(writing)
        for thread in self.threads:
            thread.start()

    def pass_on(self, descriptor: int) -> None:
        """Whole lines at once; of a line that stays unfinished for a while, such as a question, what is there."""
        reading = self.pipes[descriptor][0]
        lines = Prefixer(self.before)
        while True:
            quiet = lines.holds and not select.select([reading], [], [], _QUIET)[0]
            part = b"" if quiet else os.read(reading, _PART)
            with suppress(OSError):  # nobody reads any more
                _write(descriptor, lines.feed(part) if part else lines.flush())
            if not part and not quiet:
                return

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(_QUIET * 4)  # unless something that the program left behind holds on to it


class Pulse:
    """Tells whether the program computes in a call that keeps the interpreter lock, and with it the heartbeats."""

    def __init__(self) -> None:
        self.late: tuple[float, float, float] | None = None  # when it was due; the time and the cpu time at a look

    def is_kept_late(self, status: bytes) -> bool:
        """Whether it is late, and the program has computed since an earlier look at the same state.

        A program that is stopped, or blocked with the lock, does not compute: it is as dead as its silence says.
        """
        pid, due = PULSE.unpack_from(status, LINE_BYTES)
        now = time.monotonic()
        used = cpu_time(pid) if 0 < due < now else None
        if used is None:
            self.late = None
        elif self.late is None or self.late[0] != due:
            self.late = due, now, used
        elif now - self.late[1] >= _LOOK_AROUND:
            _, then, before = self.late
            self.late = due, now, used
            return used - before > _BUSY * (now - then)
        return False


class Input:
    """The standard input of rank 0's program: a pipe that is filled with what the launcher reads."""

    def __init__(self, endpoint: str) -> None:
        self.link = connect_launcher(endpoint, "0")
        give_up_after(self.link, 0)  # a program that does not read for an hour is in its right
        Channel(self.link).send({"input": True})
        self.reading, self.writing = os.pipe()

    def become(self) -> None:
        """In the program's process: read from the pipe."""
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
            return  # the program does not read any more; or the launcher is lost, which is no end of the input
        os.close(self.writing)


class Wrapper:
    """One rank's program and what is told about it."""

    def __init__(self, rank: str) -> None:
        self.rank, self.host = rank, os.uname().nodename
        self.parent = os.getppid()
        endpoint = os.environ.pop("RINGATTN_LAUNCHER")
        self.link = connect_launcher(endpoint, rank)
        self.launcher = Channel(self.link)
        self.input = Input(endpoint) if rank == "0" else None
        self.folder = os.environ.pop("RINGATTN_LAUNCH_DIR", "")
        self.status = make_status_file(self.folder)
        self.pulse = Pulse()
        self.child = 0
        self.code: int | None = None  # as in subprocess: negative for a signal
        self.recorded = False
        self.opening = False  # it waits for the others to open a ring
        self.asked = False  # a signal that means "end" came through here
        self.held = True  # by the launcher
        self.lost = False  # its host, or the way there

    def tell(self, **what: object) -> bool:
        """Say something to the launcher; whether it could be said."""
        try:
            self.launcher.send(what)
        except OSError:
            return False  # it is gone, and nobody is left to hear it
        return True

    def start(self, command: Sequence[str]) -> None:
        """Start the program, with every inherited descriptor: MPICH's process manager talks through one of them."""
        environment = {**os.environ, "RINGATTN_STATUS": self.status, "RINGATTN_RANK": self.rank}
        prctl, outputs = _find_prctl(), Outputs(self.rank) if environment.pop("RINGATTN_LAUNCH_PREFIX", "") else None
        wrapper = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # none may fall between the fork and the handlers
        self.child = os.fork()
        if self.child == 0:
            try:
                os.setpgid(0, 0)  # MPI signals our whole group: the program shall get each signal once, from us
                if prctl:
                    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whoever kills us leaves no orphan
                    if os.getppid() != wrapper:
                        os._exit(128 + signal.SIGKILL)
                if outputs:
                    outputs.become()
                if self.input:
                    self.input.become()
                _become(command, environment, self.rank)
            finally:
                os._exit(126)
        self.wake = self._handle_signals()
        if outputs:
            outputs.start()
        if self.input:
            self.input.start()
        self.outputs = outputs
        processes = [(pid, start_time(pid) or "") for pid in (wrapper, self.child)]
        self.tell(host=self.host, processes=processes)

    def _handle_signals(self) -> int:
        """Pass signals on from now; returns a descriptor that turns readable when one, or SIGCHLD, has come."""
        wake, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: self.forward(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return wake

    def forward(self, number: int) -> None:
        self.asked = self.asked or number in _ENDING
        if self.code is None:
            signal_group(self.child, number)

    def wait(self) -> int:
        """Return an exit code once the launcher has let go: 0 if it knows how the program ended, else the program's.

        MPI would print a banner for a failure that the launcher has long reported, and often name the wrong rank.
        """
        while True:
            self.reap()
            self.look()
            if not self.held or os.getppid() != self.parent:
                break
            if self.code is not None and self.asked:
                break  # MPI wants this process gone
            link = self.link.fileno()
            if link in select.select([self.wake, link], [], [], _LOOK_AROUND)[0]:
                self.hear()
            _drain(self.wake)
        if self.code is None:
            self.asked = True
            signal_group(self.child, signal.SIGKILL)
            self.ended(os.waitpid(self.child, 0)[1])
        if self.outputs:
            self.outputs.finish()
        remove_status_file(self.status, self.folder)
        assert self.code is not None
        if self.lost and os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)  # MPI's own process here, which would wait for its launcher for ever
        if self.recorded:
            return 0
        return self.code if self.code >= 0 else 128 - self.code

    def hear(self) -> None:
        """Do what the launcher says: signal the program, or let everything here end."""
        try:
            self.held = self.launcher.read()
            while (message := self.launcher.next()) is not None:
                if "computing" in message:
                    self.count_computing(take(message, "computing", int))
                elif self.code is None:
                    signal_group(self.child, take(message, "signal", int))
        except OSError:
            self.held, self.lost = False, True

    def count_computing(self, rank: int) -> None:
        """Tell the library that `rank` was seen to compute."""
        at = LINE_BYTES + PULSE.size + rank
        with suppress(OSError), open(self.status, "r+b") as file:
            file.seek(at)
            counter = file.read(1)
            file.seek(at)
            file.write(bytes([(counter[0] + 1) % 256]) if counter else b"")

    def reap(self) -> None:
        """Tell what became of the program since the last look."""
        while self.code is None:
            pid, status = os.waitpid(self.child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                self.tell(stopped=os.WIFSTOPPED(status))
            else:
                self.ended(status)

    def read_status(self) -> bytes:
        """What the program's library says of itself."""
        with suppress(OSError), open(self.status, "rb") as file:
            return file.read(FILE_BYTES).ljust(FILE_BYTES, b"\0")
        return bytes(FILE_BYTES)

    def look(self) -> None:
        """Tell when the program begins, or ceases, to wait for a ring, and that it computes without heartbeats."""
        status = self.read_status()
        opening = self.code is None and parse_status(status).get("call") == "init"
        if opening != self.opening:
            self.opening = opening
            self.tell(opening=opening)
        if self.code is None and self.pulse.is_kept_late(status):
            self.tell(computing=True)

    def ended(self, status: int) -> None:
        self.code = os.waitstatus_to_exitcode(status)
        give_up_after(self.link, _LAST_WORDS)
        self.recorded = self.tell(ended=self.code, asked=self.asked, known=parse_status(self.read_status()))


def _find_prctl() -> Any:
    if sys.platform != "linux":
        return None
    try:
        import ctypes

        return ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None


def _become(command: Sequence[str], environment: dict[str, str], rank: str) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGPIPE, getattr(signal, "SIGXFSZ", signal.SIGPIPE)):
        signal.signal(number, signal.SIG_DFL)  # Python handles or ignores these, and an ignored one stays ignored
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if rank != "0":  # MPICH gives the others a pipe that never ends
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        print(f"ringattn: rank {rank} cannot run {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _write(descriptor: int, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[os.write(descriptor, left) :]


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 512):
            pass
    except BlockingIOError:
        pass


def launched_rank() -> str:
    """The rank that mpiexec gave this process, ``"0"`` without one."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
    return next((os.environ[name] for name in names if os.environ.get(name)), "0")


def available_cores() -> int:
    """The cores this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def settle(environment: MutableMapping[str, str]) -> None:
    """Go where the launcher is, on a host that has that folder, and share out the cores of this one."""
    folder = environment.pop("RINGATTN_LAUNCH_CWD", "")
    if folder:
        try:
            os.chdir(folder)
        except OSError as error:
            home = os.path.expanduser("~")
            os.chdir(home)
            here = f"{os.uname().nodename}: cannot go to {folder} ({error.strerror}); working in {home}"
            print(f"ringattn: {here}", file=sys.stderr, flush=True)
    names = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
    ranks = next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 1)
    for name in (*THREADS, "RINGATTN_THREADS"):
        environment.setdefault(name, str(max(1, available_cores() // ranks)))


def main() -> int:
    """Run ``COMMAND...``, all that follows the first ``--``."""
    rank = launched_rank()
    command = [unescape(argument) for argument in sys.argv[2:]]
    if "RINGATTN_LAUNCHER" not in os.environ:  # mpiexec alone runs the line that --dry-run has printed
        settle(os.environ)
        _become(command, dict(os.environ), rank)
    try:
        wrapper = Wrapper(rank)
    except (OSError, ValueError) as error:
        print(f"ringattn: rank {rank} ({os.uname().nodename}) cannot reach the launcher: {error}", file=sys.stderr)
        return 1
    settle(os.environ)
    wrapper.start(command)
    return wrapper.wait()


if __name__ == "__main__":
    sys.exit(main())

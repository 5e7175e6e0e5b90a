"""What every rank runs under: starts the program, stays beside it, and writes down how it ended.

Run by path, ``python -IS rank.py -- COMMAND...``, so that a rank pays some 20 ms for it and no library is imported.
mpiexec starts it, and it shares a directory (``RINGATTN_LAUNCH_DIR``) with the launcher on the same machine:

    leash       a FIFO whose writing end the launcher holds. When it lets go, or dies, everything here ends
    2.status    256 bytes in which the library of rank 2 keeps ``rank=2 call=ring_attention hop=3``, NUL-padded
    2.started   the pid and start time of this process and of the program
    2.stopped   exists while the program is stopped (SIGSTOP)
    2.ended     exit code, time, whether a signal that came through here asked for it, and one line for people

This process outlives the program until the launcher lets go. If it left at once, MPI would kill the other ranks before
they could say what happened to them, and MPICH's proxy would spin on the closed connection for as long as others run.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

STATUS_BYTES = 256
FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK_AROUND = 0.5  # seconds between looks at the parent; everything else wakes the wait by itself


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


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group that `pid` leads, or to it alone where it leads none; to nobody is fine."""
    for send in (os.killpg, os.kill):
        try:
            send(pid, number)
            return
        except OSError:
            continue


def describe_end(rank: str, host: str, code: int, status: bytes) -> str:
    """One line on how a rank ended. `code` is negative for a signal; `status` is what its library left behind."""
    words = status.split(b"\0", 1)[0].decode("ascii", "replace").split()
    known = dict(word.split("=", 1) for word in words if "=" in word)
    call, between = known.get("call", "-"), known.get("call", "").startswith("after:")
    where = "" if call == "-" else f" {call.replace(':', ' ', 1)}" if between else f" in {call}"
    where += f", hop {known['hop']}" if where and not between and "hop" in known else ""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return f"rank {known.get('rank', rank)} ({host}) {how}{where}"


def unescape(argument: str) -> str:
    """The argument as the user gave it: mpiexec takes a bare ``:`` for itself, so it travels as ``\\:``."""
    return argument[1:] if argument[:1] == "\\" and argument.lstrip("\\") == ":" else argument


class Wrapper:
    """One rank's program and what is written down about it."""

    def __init__(self, directory: str, rank: str) -> None:
        self.directory, self.rank = directory, rank
        self.parent = os.getppid()
        self.leash = os.open(os.path.join(directory, "leash"), os.O_RDONLY | os.O_NONBLOCK)
        self.child = 0
        self.code: int | None = None  # as in subprocess: negative for a signal
        self.recorded = False
        self.asked = False  # a signal that means "end" came through here
        self.record("status", bytes(STATUS_BYTES))

    def path(self, name: str) -> str:
        return os.path.join(self.directory, f"{self.rank}.{name}")

    def record(self, name: str, content: bytes) -> None:
        """Write a record so that a reader sees all of it or nothing."""
        draft = self.path(name + "~")
        with open(draft, "wb") as file:
            file.write(content)
        os.replace(draft, self.path(name))

    def start(self, command: Sequence[str]) -> None:
        """Start the program, with every inherited descriptor: MPICH's process manager talks through one of them."""
        environment = {**os.environ, "RINGATTN_STATUS": self.path("status")}
        del environment["RINGATTN_LAUNCH_DIR"]
        prctl = _find_prctl()
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
                _become(command, environment, self.rank)
            finally:
                os._exit(126)
        self.wake = self._handle_signals()
        processes = ((pid, start_time(pid)) for pid in (wrapper, self.child))
        self.record("started", "".join(f"{pid} {started or ''}\n" for pid, started in processes).encode())

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
            if not self.leashed():
                break
            if self.code is not None and self.asked:
                break  # MPI wants this process gone
            select.select([self.wake, self.leash], [], [], _LOOK_AROUND)
            _drain(self.wake)
        if self.code is None:
            self.asked = True
            signal_group(self.child, signal.SIGKILL)
            self.ended(os.waitpid(self.child, 0)[1])
        assert self.code is not None
        if self.recorded:
            return 0
        return self.code if self.code >= 0 else 128 - self.code

    def reap(self) -> None:
        """Write down what became of the program since the last look."""
        while self.code is None:
            pid, status = os.waitpid(self.child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                self.record("stopped", b"")
            elif os.WIFCONTINUED(status):
                os.unlink(self.path("stopped"))
            else:
                self.ended(status)

    def ended(self, status: int) -> None:
        now = time.monotonic()  # comparable between the processes of one machine
        self.code = os.waitstatus_to_exitcode(status)
        try:
            with open(self.path("status"), "rb") as file:
                place = file.read(STATUS_BYTES)
            line = describe_end(self.rank, os.uname().nodename, self.code, place)
            self.record("ended", f"{self.code} {now!r} {int(self.asked)}\n{line}\n".encode())
            self.recorded = True
        except OSError:
            pass  # the launcher is gone and took the directory along: nobody is left to read it

    def leashed(self) -> bool:
        """Whether the launcher still holds on and mpiexec still lives."""
        if os.getppid() != self.parent:
            return False
        try:
            return os.read(self.leash, 1) != b""
        except BlockingIOError:
            return True


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
    if rank != "0":  # Open MPI does this itself; MPICH gives the others a pipe that never ends
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        print(f"ringattn: rank {rank} cannot run {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def launched_rank() -> str:
    """The rank that mpiexec gave this process, ``"0"`` without one."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
    return next((os.environ[name] for name in names if os.environ.get(name)), "0")


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 512):
            pass
    except BlockingIOError:
        pass


def main() -> int:
    """Run ``COMMAND...``, all that follows the first ``--``."""
    rank = launched_rank()
    try:
        wrapper = Wrapper(os.environ["RINGATTN_LAUNCH_DIR"], rank)
    except OSError:
        return 1  # the launcher gave up before this rank was there
    if not wrapper.leashed():
        return 1
    wrapper.start([unescape(argument) for argument in sys.argv[2:]])
    return wrapper.wait()


if __name__ == "__main__":
    sys.exit(main())

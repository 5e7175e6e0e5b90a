"""The wrapper of a rank: starts the program, stays beside it, and reports to the launcher how it ended.

mpiexec runs it by path on every host, ``python -IS rank_wrapper.py -- COMMAND...``. It imports the standard library
and its own siblings alone, so that it starts fast. It connects to the launcher at the address in
``RINGATTN_LAUNCHER``; both prove that they know the key (see `rendezvous`). It sends messages, each a JSON object:

    {"host", "processes": [[pid, start time], [pid, start time]]}       the first: of this process and the program
    {"stopped": true}                               or false: the program was stopped (SIGSTOP) or goes on
    {"opening": true}                               or false: it waits for the others to open a ring, or no longer waits
    {"computing": true}                             the program computes in a call that delays its heartbeats
    {"ended": code, "asked": false, "known": {}}    whether a forwarded signal asked for it, and the content of the
                                                    status file

Rank 0 opens a second connection, on which it sends ``{"input": true}`` and receives the launcher's standard input.

The launcher sends a message for each signal to the program, ``{"signal": 15}``, and for each rank that computes
without heartbeats, ``{"computing": 3}``, which the wrapper writes to the status file. When the launcher closes its
side of the connection, or dies, the program and the wrapper end. ``RINGATTN_STATUS`` names the status file, on this
host; `ringattn.transport.failures.status_file` describes it.

This process outlives the program until the launcher releases it. If it left at once, MPI would kill the other ranks
before they could report what happened to them, and MPICH's proxy would spin on the closed connection for as long as
other ranks run.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import types
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

if __name__ == "__main__":  # run by path: an empty package in place of ringattn, whose __init__ imports MLX
    _ringattn = types.ModuleType("ringattn")
    _ringattn.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["ringattn"] = _ringattn

from ringattn.launcher.processes import available_cores, signal_group, start_time  # noqa: E402
from ringattn.launcher.program_streams import Input, Outputs  # noqa: E402
from ringattn.launcher.rank_status import (  # noqa: E402
    CHECK_EVERY,
    FILE_BYTES,
    LINE_BYTES,
    PULSE,
    Pulse,
    make_status_file,
    parse_status,
    remove_status_file,
)
from ringattn.rendezvous.channel import Channel, take  # noqa: E402
from ringattn.rendezvous.client import connect, parse_endpoint  # noqa: E402
from ringattn.rendezvous.keepalive import give_up_after, keep_alive  # noqa: E402

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GPUS = "CUDA_VISIBLE_DEVICES"  # read when a process starts CUDA
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
DEFAULT_TIMEOUT = 60.0  # s, the ring's
_CONFIRM = 3  # s for the launcher's host to confirm that it has received how the program ended


def unescape(argument: str) -> str:
    """The argument as the user gave it: mpiexec takes a bare ``:`` for itself, so it travels as ``\\:``."""
    return argument[1:] if argument[:1] == "\\" and argument.lstrip("\\") == ":" else argument


def timeout_of(environment: Mapping[str, str]) -> float:
    """Seconds without an answer after which a host counts as lost: the ring's timeout, and at least 2."""
    try:
        return max(2.0, float(environment.get("RINGATTN_TIMEOUT") or DEFAULT_TIMEOUT))
    except ValueError:
        return DEFAULT_TIMEOUT  # the ring raises an error about it


def connect_launcher(endpoint: str, rank: str) -> socket.socket:
    """Connect to the launcher; raise `OSError` or `ValueError` if that fails."""
    addresses, key = parse_endpoint(endpoint)
    link = connect(addresses, key, int(rank))
    keep_alive(link, timeout_of(os.environ))
    return link


class Wrapper:
    """One rank's program, and the connection on which the wrapper reports about it."""

    def __init__(self, rank: str) -> None:
        self.rank = rank
        self.host = os.uname().nodename
        self.parent = os.getppid()
        endpoint = os.environ.pop("RINGATTN_LAUNCHER")
        self.link = connect_launcher(endpoint, rank)
        self.launcher = Channel(self.link)
        self.input: Input | None = None
        if rank == "0":
            link = connect_launcher(endpoint, rank)
            give_up_after(link, 0)  # a program may read nothing for an hour
            Channel(link).send({"input": True})
            self.input = Input(link)
        self.folder = os.environ.pop("RINGATTN_LAUNCH_DIR", "")
        self.status = make_status_file(self.folder)
        self.pulse = Pulse()
        self.child = 0
        self.code: int | None = None  # as in subprocess: negative for a signal
        self.recorded = False
        self.opening = False  # it waits for the others to open a ring
        self.asked = False  # a signal that means "end" was forwarded
        self.held = True  # the launcher has not released this process
        self.lost = False  # the launcher's host is out of reach

    def report(self, **what: object) -> bool:
        """Send a message to the launcher; whether it could be sent."""
        try:
            self.launcher.send(what)
        except OSError:
            return False  # the launcher is gone
        return True

    def start(self, command: Sequence[str]) -> None:
        """Start the program, with every inherited descriptor: MPICH's process manager talks through one of them."""
        environment = {**os.environ, "RINGATTN_STATUS": self.status, "RINGATTN_RANK": self.rank}
        prctl = _find_prctl()
        outputs = Outputs(self.rank) if environment.pop("RINGATTN_LAUNCH_PREFIX", "") else None
        wrapper = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # none may arrive between the fork and the handlers
        self.child = os.fork()
        if self.child == 0:
            try:
                os.setpgid(0, 0)  # MPI signals the wrapper's whole group; the program gets each signal once, forwarded
                if prctl:
                    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the program dies with the wrapper
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
        self.report(host=self.host, processes=processes)

    def _handle_signals(self) -> int:
        """Forward signals from now on; return a descriptor that is readable after a signal, SIGCHLD included."""
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
        """Return an exit code once the launcher has released this process.

        It is 0 if the launcher knows how the program ended, else the program's. For another code MPI would print a
        banner about a failure that the launcher has reported already, and often name the wrong rank.
        """
        while True:
            self.reap()
            self.check_program()
            if not self.held or os.getppid() != self.parent:
                break
            if self.code is not None and self.asked:
                break  # MPI ends this process
            link = self.link.fileno()
            if link in select.select([self.wake, link], [], [], CHECK_EVERY)[0]:
                self.obey_launcher()
            _drain(self.wake)
        if self.code is None:
            self.asked = True
            signal_group(self.child, signal.SIGKILL)
            self.record_end(os.waitpid(self.child, 0)[1])
        if self.outputs:
            self.outputs.finish()
        remove_status_file(self.status, self.folder)
        assert self.code is not None
        if self.lost and os.getppid() == self.parent:
            os.kill(
                self.parent, signal.SIGKILL
            )  # MPI's own process on this host, which would wait for its launcher for ever
        if self.recorded:
            return 0
        return self.code if self.code >= 0 else 128 - self.code

    def obey_launcher(self) -> None:
        """Handle the launcher's messages: signal the program, or end it and this process."""
        try:
            self.held = self.launcher.read()
            while (message := self.launcher.next()) is not None:
                if "computing" in message:
                    self.count_computing(take(message, "computing", int))
                elif self.code is None:
                    signal_group(self.child, take(message, "signal", int))
        except OSError:
            self.held = False
            self.lost = True

    def count_computing(self, rank: int) -> None:
        """Record in the status file that the launcher sees `rank` compute."""
        place = LINE_BYTES + PULSE.size + rank
        with suppress(OSError), open(self.status, "r+b") as file:
            file.seek(place)
            counter = file.read(1)
            file.seek(place)
            file.write(bytes([(counter[0] + 1) % 256]) if counter else b"")

    def reap(self) -> None:
        """Report if the program has stopped, continued or ended."""
        while self.code is None:
            pid, status = os.waitpid(self.child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                self.report(stopped=os.WIFSTOPPED(status))
            else:
                self.record_end(status)

    def read_status(self) -> bytes:
        """Read the status file; zeros if that fails."""
        with suppress(OSError), open(self.status, "rb") as file:
            return file.read(FILE_BYTES).ljust(FILE_BYTES, b"\0")
        return bytes(FILE_BYTES)

    def check_program(self) -> None:
        """Report if the program begins or ceases to wait for a ring, or computes without heartbeats."""
        status = self.read_status()
        opening = self.code is None and parse_status(status).get("call") == "init"
        if opening != self.opening:
            self.opening = opening
            self.report(opening=opening)
        if self.code is None and self.pulse.is_kept_late(status):
            self.report(computing=True)

    def record_end(self, status: int) -> None:
        self.code = os.waitstatus_to_exitcode(status)
        give_up_after(self.link, _CONFIRM)
        self.recorded = self.report(ended=self.code, asked=self.asked, known=parse_status(self.read_status()))


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


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 512):
            pass
    except BlockingIOError:
        pass


def launched_rank() -> str:
    """The rank that mpiexec gave this process; ``"0"`` without mpiexec."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
    return next((os.environ[name] for name in names if os.environ.get(name)), "0")


def prepare_host(environment: MutableMapping[str, str]) -> None:
    """Change to the launcher's working folder, if this host has it, and share this host's cores among its ranks."""
    folder = environment.pop("RINGATTN_LAUNCH_CWD", "")
    if folder:
        try:
            os.chdir(folder)
        except OSError as error:
            home = os.path.expanduser("~")
            os.chdir(home)
            problem = f"{os.uname().nodename}: cannot go to {folder} ({error.strerror}); working in {home}"
            print(f"ringattn: {problem}", file=sys.stderr, flush=True)
    names = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
    ranks = next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 1)
    for name in (*THREADS, "RINGATTN_THREADS"):
        environment.setdefault(name, str(max(1, available_cores() // ranks)))
    choose_gpu(environment, gpu_count())


def gpu_count(folder: str = "/proc/driver/nvidia/gpus") -> int:
    """Count the NVIDIA GPUs of this host, without their library."""
    with suppress(OSError):
        return len(os.listdir(folder))
    return 0


def choose_gpu(environment: MutableMapping[str, str], count: int) -> None:
    """Give each rank of a host one of its `count` NVIDIA GPUs, or of those that the user has chosen."""
    names = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
    place = next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 0)
    given = environment.get(GPUS)
    gpus = [str(i) for i in range(count)] if given is None else [gpu for gpu in given.split(",") if gpu.strip()]
    if len(gpus) > 1:
        environment[GPUS] = gpus[place % len(gpus)].strip()


def main() -> int:
    """Run ``COMMAND...``, the arguments after the first ``--``."""
    rank = launched_rank()
    command = [unescape(argument) for argument in sys.argv[2:]]
    if "RINGATTN_LAUNCHER" not in os.environ:  # the user runs the line that --dry-run printed
        prepare_host(os.environ)
        _become(command, dict(os.environ), rank)
    try:
        wrapper = Wrapper(rank)
    except (OSError, ValueError) as error:
        print(f"ringattn: rank {rank} ({os.uname().nodename}) cannot reach the launcher: {error}", file=sys.stderr)
        return 1
    prepare_host(os.environ)
    wrapper.start(command)
    return wrapper.wait()


if __name__ == "__main__":
    sys.exit(main())

"""Running a program on several ranks, here or on several hosts, and leaving nothing behind.

The ranks' wrappers (`rank`) tell what happens; this process hears it, decides, and reports. It, not MPI, ends the
others when one rank fails: the survivors get a moment to notice and to say so themselves.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .rank import signal_group, timeout_of
from .ranks import End, Process, Ranks, own_addresses

POLL = 0.05  # seconds
SURVIVORS = 2.0  # after a rank failed: for the others to end by themselves
TERM_GRACE = 1.5  # after that, from SIGTERM to SIGKILL
SIGNAL_GRACE = 3.0  # from a signal to the launcher to SIGKILL
STOPPED = 3.0  # how long the last ranks may be stopped when others have ended
MISSING = 1.0  # how long a rank may be dead without a record before that counts as its end
WRAPPER_GRACE = 1.0  # for the wrappers to leave once they are let go
MPIEXEC_GRACE = 3.0  # for mpiexec to leave after its ranks, when something went wrong


def run(line: Sequence[str], *, ranks: int, environment: Mapping[str, str], hosts: Sequence[str] = ()) -> int:
    """Run the command line of `mpiexec.build_command` and return the exit code for the whole.

    `hosts` are the addresses of the hosts that ranks run on; none: this machine alone.

    It is the code of the rank that failed first, 128 + signal for one that was killed, and 0 only if every rank gave 0.
    SIGINT, SIGTERM and SIGHUP end every rank (at once when they come twice) and give 128 + signal. When this returns or
    raises, every process of the run is dead and its temporary directory is gone.
    """
    job = Job(ranks, Ranks(own_addresses(hosts), timeout_of(environment)))
    with _handled(job.interrupt), tempfile.TemporaryDirectory(prefix="ringattn-", ignore_cleanup_errors=True) as folder:
        try:
            job.start(line, environment, Path(folder))
            job.watch()
        finally:
            job.sweep()
    return job.conclude()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Job:
    """One run: what is known of its ranks, and whether and when it has to end."""

    def __init__(self, size: int, ranks: Ranks) -> None:
        self.size, self.ranks = size, ranks
        self.signal = 0  # the one that the launcher got
        self.kill_at = float("inf")
        self._term_at = float("inf")
        self._stopped_since: float | None = None
        self._writing_at = 0.0  # when mpiexec was last seen to be allowed to write
        self._reported = False
        self._look_at = 0.0  # for missing ranks: not at every turn, since it costs a process per rank on a Mac
        self._free: set[str] = set()  # ranks whose wrappers were told to leave
        self._told: set[str] = set()  # ranks that were still running when we asked them to end
        self._mpiexec: subprocess.Popen[bytes] | None = None

    def interrupt(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal: the first one is passed on to the ranks, the second one kills them."""
        now = time.monotonic()
        self.kill_at = now if self.signal else min(self.kill_at, now + SIGNAL_GRACE)
        self.signal = self.signal or number

    def start(self, line: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """Start mpiexec, out of reach of the terminal's Ctrl-C: only we decide who gets which signal."""
        environment = {**environment, "RINGATTN_LAUNCH_DIR": str(folder), "RINGATTN_LAUNCHER": self.ranks.told}
        self._mpiexec = subprocess.Popen(list(line), env=environment, start_new_session=True)

    def watch(self) -> None:
        """Return when every rank has ended, or when those left must be killed."""
        while not self._finished():
            now = time.monotonic()
            self._look_for_missing(now)
            if self.signal:
                self._pass_on(self.signal)
            elif self._first_failure():
                self._end_survivors(now)
            else:
                self._mind_stopped(now)
            if now >= self.kill_at:
                return
            time.sleep(POLL)

    def sweep(self) -> None:
        """Kill what still lives and wait until all of it is gone."""
        self._read()
        self._let_go()
        let_go = time.monotonic()
        while self._mpiexec and self._mpiexec.poll() is None:
            self._read()
            self._let_go()  # a wrapper may have come after the first look
            self._hurry(let_go)
            time.sleep(POLL / 5)
        for process in self._processes():
            process.kill_group()
        self._await_death()
        self.ranks.close()

    def _let_go(self) -> None:
        """Kill the programs, and tell the wrappers to leave."""
        for number, rank in self.ranks.items():
            if number not in self._free:
                self._free.add(number)
                rank.kill()
                rank.connection.let_go()

    def conclude(self) -> int:
        """The exit code for the whole run, once it is over; a line on what MPI did where no rank has said anything."""
        if self.signal:
            return 128 + self.signal
        failure = self._first_failure()
        if failure:
            return failure.status
        ends = [rank.end for rank in self.ranks.values() if rank.end]
        if len(ends) == self.size and not any(end.code for end in ends):
            return 0
        code = self._mpiexec.returncode if self._mpiexec else 1  # MPI ended it: an abort, or it could not start
        say(f"mpiexec ended with code {code}; ranks that had not ended: {self._living() or 'none'}")
        if code:
            return code if code > 0 else 128 - code
        return max((end.status for end in ends), default=0) or 1  # it may say 0 of ranks that were killed

    def _finished(self) -> bool:
        over = self._mpiexec is None or self._mpiexec.poll() is not None
        self._read()
        return over or (len(self.ranks) == self.size and all(rank.end for rank in self.ranks.values()))

    def _read(self) -> None:
        """Hear the wrappers, and report the first rank that failed if it was killed (others speak for themselves)."""
        self.ranks.hear()
        failure = self._first_failure()
        if failure and not self._reported:
            self._reported = True
            if failure.code < 0:
                say(failure.line)

    def _look_for_missing(self, now: float) -> None:
        """Give up ranks whose wrapper died, unless MPI killed them: then mpiexec ends too, with the code."""
        if now < self._look_at:
            return
        self._look_at = now + MISSING
        for rank in self.ranks.values():
            if rank.end is None and not rank.watched:
                rank.kill()  # on a Mac it outlives its wrapper, and nobody would report its end
                if rank.missing_since is not None or rank.lost:
                    gone = "(its wrapper) was killed" if rank.here else f"({rank.host}): the connection to it was lost"
                    line = f"rank {rank.number} {gone}"
                    rank.end = End(-signal.SIGKILL, rank.missing_since or now, self._ending, line)
                rank.missing_since = rank.missing_since or now

    @property
    def _ending(self) -> bool:
        return bool(self.signal) or self.kill_at < float("inf")

    def _first_failure(self) -> End | None:
        """The cause: the first that failed without having been asked to end."""
        ends = (rank.end for rank in self.ranks.values() if rank.number not in self._told)
        return min((e for e in ends if e and e.code and not e.asked), key=lambda e: e.time, default=None)

    def _pass_on(self, number: int) -> None:
        for rank in self.ranks.values():
            if rank.end is None and rank.number not in self._told:
                rank.signal(number)
                self._told.add(rank.number)

    def _end_survivors(self, now: float) -> None:
        left = [rank for rank in self.ranks.values() if rank.end is None]
        deaf = bool(left) and len(self.ranks) == self.size and all(rank.stopped for rank in left)
        if self._term_at == float("inf"):
            self._term_at, self.kill_at = now + SURVIVORS, now + SURVIVORS + TERM_GRACE
        if deaf:  # to all but SIGKILL
            self._term_at, self.kill_at = min(self._term_at, now), min(self.kill_at, now)
        if now >= self._term_at and not self._told:
            failure = self._first_failure()
            assert failure is not None
            cause = "" if failure.code < 0 else f"{failure.line}; "  # a killed one has been reported
            say(f"{cause}ending the ranks still running: {self._living()}")
            self._pass_on(signal.SIGTERM)

    def _mind_stopped(self, now: float) -> None:
        """End stopped ranks that are the last ones: those who could have continued them have left."""
        left = [rank for rank in self.ranks.values() if rank.end is None]
        if len(left) == self.size or len(self.ranks) < self.size or not all(rank.stopped for rank in left):
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since > STOPPED:
            say(f"all other ranks have ended; killing the ranks left: {self._living()}")
            self.kill_at = now

    def _living(self) -> str:
        return ", ".join(sorted(str(rank) for rank in self.ranks.values() if rank.end is None))

    def _processes(self) -> list[Process]:
        return [process for rank in self.ranks.values() for process in rank.here]

    def _hurry(self, let_go: float) -> None:
        """Kill the wrappers, then mpiexec, when they do not leave; one that still writes output may take its time."""
        now = time.monotonic()
        if now - let_go > WRAPPER_GRACE:
            for process in self._processes():
                process.kill_group()
        clean = not self._ending and all(rank.end and not rank.end.code for rank in self.ranks.values())
        if not self.signal and (clean or _output_blocked()):
            self._writing_at = now
        grace = 0.0 if any(rank.lost for rank in self.ranks.values()) else MPIEXEC_GRACE  # it would wait for ever
        if now - max(let_go, self._writing_at) > WRAPPER_GRACE + grace and self._mpiexec:
            signal_group(self._mpiexec.pid, signal.SIGKILL)

    def _await_death(self) -> None:
        end = time.monotonic() + WRAPPER_GRACE
        while time.monotonic() < end and not all(rank.left for rank in self.ranks.values()):
            time.sleep(POLL / 5)
            self._read()


def _output_blocked() -> bool:
    """Whether a reader such as ``less`` does not take what mpiexec has to write."""
    try:
        return len(select.select([], [1, 2], [], 0)[1]) < 2
    except (OSError, ValueError):
        return False


def say(line: str) -> None:
    """One line to standard error, which may be gone already."""
    with suppress(OSError, ValueError):
        print(f"ringattn: {line}", file=sys.stderr, flush=True)

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

from ..transport.addresses import own_addresses
from .processes import signal_group
from .rank_table import End, Process, Ranks
from .rank_wrapper import timeout_of

POLL = 0.05  # seconds
SURVIVORS = 2.0  # after a rank failed: for the others to end by themselves, which takes the library 1.5 s
TERM_GRACE = 1.5  # after that, from SIGTERM to SIGKILL
SIGNAL_GRACE = 3.0  # from a signal to the launcher to SIGKILL
STOPPED = 3.0  # how long the last ranks may be stopped when others have ended
MISSING = 1.0  # how long a rank may be dead without a record before that counts as its end
WRAPPER_GRACE = 1.0  # for the wrappers to leave once they are let go
AT_ONCE = 1.0  # between two SIGINTs of which the second one ends patient ranks
MPIEXEC_GRACE = 3.0  # for mpiexec to leave after its ranks, when something went wrong


def run(
    line: Sequence[str],
    *,
    ranks: int,
    environment: Mapping[str, str],
    hosts: Sequence[str] = (),
    patient: bool = False,
    explained: bool = False,
) -> int:
    """Run the command line of `mpiexec.build_command` and return the exit code for the whole.

    `hosts` are the addresses of the hosts that ranks run on; none: this machine alone.

    It is the code of the rank that failed first, 128 + signal for one that was killed, and 0 only if every rank gave 0.
    SIGINT, SIGTERM and SIGHUP end every rank (at once when they come twice) and give 128 + signal. With `patient`, the
    ranks get a SIGINT to do with as they like, and it ends them only if one fails of it, or if it comes twice within a
    second. With `explained`, the program says itself why it exits with an error code, and nothing is added.

    When this returns or raises, every process of the run is dead and its temporary directory is gone.
    """
    timeout = timeout_of(environment)
    job = Job(ranks, Ranks(own_addresses(hosts), timeout), timeout, patient, explained)
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
    """One run: what is known of its ranks, and whether and when it has to end.

    Args:
        size: How many ranks there are to be.
        ranks: Those that have reported.
        timeout: Seconds after which ranks that wait for a ring that cannot open any more are given up.
        patient: Whether the ranks may go on after a SIGINT.
        explained: Whether the program says itself why it exits with an error code.
    """

    def __init__(self, size: int, ranks: Ranks, timeout: float, patient: bool = False, explained: bool = False) -> None:
        self.size, self.ranks, self._timeout = size, ranks, timeout
        self.signal = 0  # the one that the launcher got
        self.kill_at = float("inf")
        self._explained = explained
        self._patient, self._interrupted_at, self._interrupting = patient, -float("inf"), False
        self._term_at = float("inf")
        self._stopped_since: float | None = None
        self._writing_at = 0.0  # when mpiexec was last seen to be allowed to write
        self._reported = False
        self._gave_up = False  # on ranks that waited for a ring
        self._look_at = 0.0  # for missing ranks: not at every turn, since it costs a process per rank on a Mac
        self._free: set[str] = set()  # ranks whose wrappers were told to leave
        self._told: set[str] = set()  # ranks that were still running when we asked them to end
        self._mpiexec: subprocess.Popen[bytes] | None = None

    def interrupt(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal: the first one is passed on to the ranks, the second one kills them."""
        now = time.monotonic()
        patient = self._patient and number == signal.SIGINT and not self.signal and len(self.ranks) == self.size
        if patient and now - self._interrupted_at > AT_ONCE:
            self._interrupted_at, self._interrupting = now, True
            return
        self.kill_at = now if self.signal else min(self.kill_at, now + SIGNAL_GRACE)
        self.signal = self.signal or number

    def start(self, line: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """Start mpiexec, out of reach of the terminal's Ctrl-C: only we decide who gets which signal."""
        environment = {**environment, "RINGATTN_LAUNCH_DIR": str(folder), "RINGATTN_LAUNCHER": self.ranks.endpoint}
        self._mpiexec = subprocess.Popen(
            list(line), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )  # rank 0 gets our standard input through its wrapper

    def watch(self) -> None:
        """Return when every rank has ended, or when those left must be killed."""
        while not self._finished():
            now = time.monotonic()
            self._look_for_missing(now)
            self._interrupt_patient()
            if self.signal:
                self._pass_on(self.signal)
            elif self._first_failure():
                self._end_survivors(now)
            else:
                self._mind_stopped(now)
                self._mind_opening(now)
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
            known = failure.caused or (self._explained and failure.code > 0)
            if not self._reported and not known:
                say(failure.line)
            return failure.status
        if self._gave_up:
            return 1
        ends = [rank.end for rank in self.ranks.values() if rank.end]
        if len(ends) == self.size and not any(end.code for end in ends):
            return 0
        code = self._mpiexec.returncode if self._mpiexec else 1  # MPI ended it: an abort, or it could not start
        if code == -signal.SIGPIPE:  # whoever read the output wants no more of it
            return 128 + signal.SIGPIPE
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
        failure, now = self._first_failure(), time.monotonic()
        if failure and not self.signal and now - self._interrupted_at < SIGNAL_GRACE:
            self.signal, self.kill_at = signal.SIGINT, now + SIGNAL_GRACE
        elif failure and not self._reported and failure.code < 0:
            self._reported = True
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
                    rank.end = End(-signal.SIGKILL, rank.missing_since or now, self._ending, False, line)
                rank.missing_since = rank.missing_since or now

    @property
    def _ending(self) -> bool:
        return bool(self.signal) or self.kill_at < float("inf")

    def _first_failure(self) -> End | None:
        """The cause: the first that failed without having been asked to end, and by itself if there is one."""
        ends = (rank.end for rank in self.ranks.values() if rank.number not in self._told)
        failed = (end for end in ends if end and end.code and not end.asked)
        return min(failed, key=lambda end: (end.caused, end.time), default=None)

    def _interrupt_patient(self) -> None:
        """Tell ranks that may go on of a SIGINT."""
        if self._interrupting:
            self._interrupting = False
            for rank in self.ranks.values():
                if rank.end is None:
                    rank.signal(signal.SIGINT)

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
            cause = "" if self._reported else f"{failure.line}; "
            self._reported = True
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

    def _mind_opening(self, now: float) -> None:
        """End ranks that wait for a ring when nobody is left who could still come to open it."""
        left = [rank for rank in self.ranks.values() if rank.end is None]
        since = [rank.opening_since for rank in left if not rank.stopped]
        if not since or any(start is None or now - start < self._timeout for start in since):
            return  # one of them may come, however long its work before that takes
        never = [str(number) for number in range(self.size) if str(number) not in self.ranks]
        absent = {
            "had ended": [str(rank) for rank in self.ranks.values() if rank.end],
            "stopped": [rank.number for rank in left if rank.stopped],
            "had not started": never,
        }
        why = ", ".join(f"{how}: {', '.join(sorted(who))}" for how, who in absent.items() if who)
        say(
            f"no ring within {self._timeout:g} s: ranks that wait for it in init: {self._living()}; "
            + (why or "see what ringattn doctor says of the network between them")
        )
        self._gave_up, self._reported = True, True
        self._told.update(rank.number for rank in left)
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

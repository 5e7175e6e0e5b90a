"""The supervisor of a run: starts a program on several ranks, here or on several hosts, and ends all its processes.

The ranks' wrappers (`rank_wrapper`) report what happens; this process decides, and informs the user. It, not MPI, ends
the other ranks when one fails, after they had time to notice and to print why.
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
from ..transport.failures.cause import Cause
from .processes import signal_group
from .rank_table import End, Process, RankTable
from .rank_wrapper import timeout_of

POLL = 0.05  # seconds
SURVIVOR_GRACE = 2.0  # after a rank failed: for the others to end by themselves, which takes the library 1.5 s
TERM_GRACE = 1.5  # after that, from SIGTERM to SIGKILL
SIGNAL_GRACE = 3.0  # from a signal to the launcher to SIGKILL
STOPPED = 3.0  # for which the last ranks may be stopped when others have ended
MISSING = 1.0  # for which a rank may be dead without a report before that counts as its end
WRAPPER_GRACE = 1.0  # for the wrappers to leave once they are released
DOUBLE_SIGINT = 1.0  # between two SIGINTs of which the second one ends ranks that get the first one
MPIEXEC_GRACE = 3.0  # for mpiexec to leave after its ranks, if the run failed


def run(
    line: Sequence[str],
    *,
    ranks: int,
    environment: Mapping[str, str],
    hosts: Sequence[str] = (),
    forward_sigint: bool = False,
    explained: bool = False,
) -> int:
    """Run the command line of `mpiexec.build_command` and return the exit code of the run.

    It is the code of the rank that failed first, 128 + signal for one that was killed, and 0 only if every rank gave 0.
    SIGINT, SIGTERM and SIGHUP end every rank (at once when they come twice) and give 128 + signal.

    When this returns or raises, every process of the run is dead and its temporary directory is gone.

    Args:
        line: The command line.
        ranks: The number of ranks.
        environment: The environment of mpiexec.
        hosts: The addresses of the hosts that ranks run on; none: this machine alone.
        forward_sigint: Send the ranks each SIGINT, which then ends them only if one of them fails, or if a second
            SIGINT comes within `DOUBLE_SIGINT` seconds.
        explained: The program prints itself why it exits with an error code, and the launcher adds nothing.
    """
    timeout = timeout_of(environment)
    supervisor = Supervisor(ranks, RankTable(own_addresses(hosts), timeout), timeout, forward_sigint, explained)
    with (
        _handled(supervisor.interrupt),
        tempfile.TemporaryDirectory(prefix="ringattn-", ignore_cleanup_errors=True) as folder,
    ):
        try:
            supervisor.start(line, environment, Path(folder))
            supervisor.watch()
        finally:
            supervisor.sweep()
    return supervisor.conclude()


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


class Supervisor:
    """The state of one run, and the decision when it ends.

    Args:
        size: The number of ranks.
        ranks: The table of ranks that have reported.
        timeout: Seconds after which ranks end that wait for a ring that can open no more.
        forward_sigint: Whether the ranks may go on after a SIGINT.
        explained: Whether the program prints itself why it exits with an error code.
    """

    def __init__(
        self, size: int, ranks: RankTable, timeout: float, forward_sigint: bool = False, explained: bool = False
    ) -> None:
        self.size = size
        self.ranks = ranks
        self._timeout = timeout
        self.signal = 0  # the number of the signal that ends the run
        self.kill_at = float("inf")
        self._explained = explained
        self._forward_sigint = forward_sigint
        self._interrupted_at = -float("inf")
        self._interrupting = False  # a SIGINT is to be forwarded
        self._term_at = float("inf")
        self._stopped_since: float | None = None
        self._writing_at = 0.0  # when mpiexec last had output to write
        self._reported = False
        self._gave_up = False  # ended ranks that waited for a ring
        self._look_at = 0.0  # next check for missing ranks: on a Mac it costs a process for each rank
        self._released: set[str] = set()  # ranks whose wrappers may leave
        self._asked: set[str] = set()  # ranks that were still running when they were asked to end
        self._mpiexec: subprocess.Popen[bytes] | None = None

    def interrupt(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: forward the first one to the ranks, kill them at the second one."""
        now = time.monotonic()
        forward = self._forward_sigint and number == signal.SIGINT and not self.signal
        if forward and len(self.ranks) == self.size and now - self._interrupted_at > DOUBLE_SIGINT:
            self._interrupted_at = now
            self._interrupting = True
            return
        self.kill_at = now if self.signal else min(self.kill_at, now + SIGNAL_GRACE)
        self.signal = self.signal or number

    def start(self, line: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """Start mpiexec out of reach of the terminal's Ctrl-C: this object alone decides which rank gets a signal."""
        environment = {**environment, "RINGATTN_LAUNCH_DIR": str(folder), "RINGATTN_LAUNCHER": self.ranks.endpoint}
        self._mpiexec = subprocess.Popen(
            list(line), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )  # rank 0 gets this process's standard input through its wrapper

    def watch(self) -> None:
        """Return when every rank has ended, or when the rest must be killed."""
        while not self._finished():
            now = time.monotonic()
            self._look_for_missing(now)
            self._forward_interrupt()
            if self.signal:
                self._ask_to_end(self.signal)
            elif self._first_failure():
                self._end_survivors(now)
            else:
                self._kill_if_all_stopped(now)
                self._enforce_init_timeout(now)
            if now >= self.kill_at:
                return
            time.sleep(POLL)

    def sweep(self) -> None:
        """Kill all processes that are left and wait until they are gone."""
        self._read()
        self._release_wrappers()
        released_at = time.monotonic()
        while self._mpiexec and self._mpiexec.poll() is None:
            self._read()
            self._release_wrappers()  # a wrapper may have connected meanwhile
            self._kill_late_wrappers(released_at)
            time.sleep(POLL / 5)
        for process in self._processes():
            process.kill_group()
        self._await_death()
        self.ranks.close()

    def _release_wrappers(self) -> None:
        """Kill the programs, and let the wrappers leave."""
        for number, rank in self.ranks.items():
            if number not in self._released:
                self._released.add(number)
                rank.kill()
                rank.connection.release()

    def conclude(self) -> int:
        """Return the exit code of a finished run; print how mpiexec ended if no rank has failed."""
        if self.signal:
            return 128 + self.signal
        failure = self._first_failure()
        if failure:
            known = failure.consequence or (self._explained and failure.code > 0)
            if not self._reported and not known:
                say(str(failure.cause))
            return failure.status
        if self._gave_up:
            return 1
        ends = [rank.end for rank in self.ranks.values() if rank.end]
        if len(ends) == self.size and not any(end.code for end in ends):
            return 0
        code = self._mpiexec.returncode if self._mpiexec else 1  # MPI ended it: an abort, or it could not start
        if code == -signal.SIGPIPE:  # the reader of the output is gone
            return 128 + signal.SIGPIPE
        say(f"mpiexec ended with code {code}; ranks that had not ended: {self._living() or 'none'}")
        if code:
            return code if code > 0 else 128 - code
        return max((end.status for end in ends), default=0) or 1  # mpiexec may give 0 for ranks that were killed

    def _finished(self) -> bool:
        over = self._mpiexec is None or self._mpiexec.poll() is not None
        self._read()
        return over or (len(self.ranks) == self.size and all(rank.end for rank in self.ranks.values()))

    def _read(self) -> None:
        """Read the wrappers' messages; print the first failure if that rank was killed: others print why they fail."""
        self.ranks.read()
        failure = self._first_failure()
        now = time.monotonic()
        if failure and not self.signal and now - self._interrupted_at < SIGNAL_GRACE:
            self.signal = signal.SIGINT
            self.kill_at = now + SIGNAL_GRACE
        elif failure and not self._reported and failure.code < 0:
            self._reported = True
            say(str(failure.cause))

    def _look_for_missing(self, now: float) -> None:
        """Record the end of ranks whose wrapper died. If MPI killed them, mpiexec ends too, with the exit code."""
        if now < self._look_at:
            return
        self._look_at = now + MISSING
        for rank in self.ranks.values():
            if rank.end is None and not rank.watched:
                rank.kill()  # on a Mac it outlives its wrapper, and its end would not be reported
                if rank.missing_since is not None or rank.lost:
                    kind = "unwatched" if rank.here else "lost"
                    cause = Cause(kind, int(rank.number), rank.host, exit_code=-signal.SIGKILL)
                    rank.end = End(cause, rank.missing_since or now, self._ending, False)
                rank.missing_since = rank.missing_since or now

    @property
    def _ending(self) -> bool:
        return bool(self.signal) or self.kill_at < float("inf")

    def _first_failure(self) -> End | None:
        """The cause: the first that failed without having been asked to end, and by itself if there is one."""
        ends = (rank.end for rank in self.ranks.values() if rank.number not in self._asked)
        failed = (end for end in ends if end and end.code and not end.asked)
        return min(failed, key=lambda end: (end.consequence, end.time), default=None)

    def _forward_interrupt(self) -> None:
        """Send a SIGINT to ranks that may go on after it."""
        if self._interrupting:
            self._interrupting = False
            for rank in self.ranks.values():
                if rank.end is None:
                    rank.signal(signal.SIGINT)

    def _ask_to_end(self, number: int) -> None:
        """Send a signal that means "end" to all ranks, once."""
        for rank in self.ranks.values():
            if rank.end is None and rank.number not in self._asked:
                rank.signal(number)
                self._asked.add(rank.number)

    def _end_survivors(self, now: float) -> None:
        left = [rank for rank in self.ranks.values() if rank.end is None]
        all_stopped = bool(left) and len(self.ranks) == self.size and all(rank.stopped for rank in left)
        if self._term_at == float("inf"):
            self._term_at = now + SURVIVOR_GRACE
            self.kill_at = self._term_at + TERM_GRACE
        if all_stopped:  # SIGKILL alone ends them
            self._term_at = min(self._term_at, now)
            self.kill_at = min(self.kill_at, now)
        if now >= self._term_at and not self._asked:
            failure = self._first_failure()
            assert failure is not None
            cause = "" if self._reported else f"{failure.cause}; "
            self._reported = True
            say(f"{cause}ending the ranks still running: {self._living()}")
            self._ask_to_end(signal.SIGTERM)

    def _kill_if_all_stopped(self, now: float) -> None:
        """End the last ranks if all of them are stopped and no other is left to continue them."""
        left = [rank for rank in self.ranks.values() if rank.end is None]
        if len(left) == self.size or len(self.ranks) < self.size or not all(rank.stopped for rank in left):
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since > STOPPED:
            say(f"all other ranks have ended; killing the ranks left: {self._living()}")
            self.kill_at = now

    def _enforce_init_timeout(self, now: float) -> None:
        """End ranks that wait for a ring if no rank is left that could still join it."""
        left = [rank for rank in self.ranks.values() if rank.end is None]
        since = [rank.opening_since for rank in left if not rank.stopped]
        # A rank that has ended may have opened the ring, of which one that waits has not heard yet.
        last = max((rank.end.time for rank in self.ranks.values() if rank.end), default=0.0)
        if not since or any(start is None or now - max(start, last) < self._timeout for start in since):
            return  # a rank may join later, however long its work before `init` takes
        never = [str(number) for number in range(self.size) if str(number) not in self.ranks]
        absent = {
            "had ended": [str(rank) for rank in self.ranks.values() if rank.end],
            "stopped": [rank.number for rank in left if rank.stopped],
            "had not started": never,
        }
        why = ", ".join(f"{how}: {', '.join(sorted(who))}" for how, who in absent.items() if who)
        say(
            f"no ring within {self._timeout:g} s: ranks that wait for it in init: {self._living()}; "
            + (why or "run ringattn doctor to check the network between them")
        )
        self._gave_up = True
        self._reported = True
        self._asked.update(rank.number for rank in left)
        self.kill_at = now

    def _living(self) -> str:
        return ", ".join(sorted(str(rank) for rank in self.ranks.values() if rank.end is None))

    def _processes(self) -> list[Process]:
        return [process for rank in self.ranks.values() for process in rank.here]

    def _kill_late_wrappers(self, released_at: float) -> None:
        """Kill wrappers, then mpiexec, if they do not leave in time. Time in which mpiexec writes does not count."""
        now = time.monotonic()
        if now - released_at > WRAPPER_GRACE:
            for process in self._processes():
                process.kill_group()
        clean = not self._ending and all(rank.end and not rank.end.code for rank in self.ranks.values())
        if not self.signal and (clean or _output_blocked()):
            self._writing_at = now
        grace = 0.0 if any(rank.lost for rank in self.ranks.values()) else MPIEXEC_GRACE  # it would wait for ever
        if now - max(released_at, self._writing_at) > WRAPPER_GRACE + grace and self._mpiexec:
            signal_group(self._mpiexec.pid, signal.SIGKILL)

    def _await_death(self) -> None:
        end = time.monotonic() + WRAPPER_GRACE
        while time.monotonic() < end and not all(rank.left for rank in self.ranks.values()):
            time.sleep(POLL / 5)
            self._read()


def _output_blocked() -> bool:
    """Whether a reader such as ``less`` does not read the output that mpiexec has to write."""
    try:
        return len(select.select([], [1, 2], [], 0)[1]) < 2
    except (OSError, ValueError):
        return False


def say(line: str) -> None:
    """Print one line to standard error, which may be closed already."""
    with suppress(OSError, ValueError):
        print(f"ringattn: {line}", file=sys.stderr, flush=True)

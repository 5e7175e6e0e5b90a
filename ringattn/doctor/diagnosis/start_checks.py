"""Checks that all ranks start, reach each other and finish."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...transport.handshake import DIFFERS
from ..records import RankReport
from .examination import Examination, Finding, join_words

INSTALL = "pip install 'ringattn[mpi]'"


def _hosts(exam: Examination) -> Iterator[Finding]:
    """Hosts on which no rank can start."""
    for trouble in exam.troubles:
        yield Finding(True, f"host {trouble.host.ssh}", trouble.what, trouble.remedy)


def _connections(exam: Examination) -> Iterator[Finding]:
    """Pairs of hosts that cannot connect, each once, with the reasons of the first ranks that tried."""
    pairs: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for failed in exam.reports.failed_connections:
        ends = exam.host(failed.caller), exam.host(failed.peer)
        pairs.setdefault(tuple(sorted(ends)), {}).setdefault(ends, failed.why)
    for pair, reasons in pairs.items():
        routes = " and ".join(f"from {caller} to {peer} ({why})" for (caller, peer), why in reasons.items())
        what = f"no TCP connection {routes}, and MPI needs one between every two hosts"
        remedy = "look at the cables, addresses and routes between these two, and at their firewalls"
        yield Finding(True, " and ".join(pair), what, remedy)


def _launch(exam: Examination) -> Iterator[Finding]:
    """Problems of MPI, and a launch that exceeds its time limit."""
    if exam.launch_problem:
        what = exam.launch_problem.removesuffix(f": {INSTALL}")
        yield Finding(True, "MPI", what, f"{INSTALL}, or give --mpiexec")
    if exam.mpi_mismatch:
        what, _, remedy = exam.mpi_mismatch.rpartition("; ")
        yield Finding(True, "MPI", what, remedy)
    if exam.exit_status is None:
        slow = {number: rank.doing for number, rank in exam.reports.ranks.items() if not rank.done}
        places = ", ".join(f"{exam.label(number)} was {doing}" for number, doing in slow.items())
        what = f"not finished after {exam.time_limit:g} s ({places or 'no rank began'})"
        yield Finding(True, "launch", what, "look at that host and its firewall, or give --timeout more seconds")


def _missing_ranks(exam: Examination) -> Iterator[Finding]:
    """Ranks that did not start."""
    if exam.launch_problem:
        return
    missing = [number for number in range(exam.size) if number not in exam.reports.ranks]
    if missing and _none_started(exam):
        yield Finding(True, "launch", f"no rank started{_because(exam)}", _start_remedy(exam, *missing))
    elif missing:
        yield Finding(True, exam.label(*missing), f"did not start{_because(exam)}", _start_remedy(exam, *missing))


def _failed_ranks(exam: Examination) -> Iterator[Finding]:
    """Ranks that reported a problem. A problem of several ranks is one finding."""
    if exam.launch_problem or _none_started(exam):
        return
    problems: dict[str, int] = {}
    for number, rank in exam.reports.ranks.items():
        if rank.problem:
            problems.setdefault(rank.problem, number)
    for problem, number in problems.items():
        if not problem.startswith(DIFFERS):
            yield Finding(True, exam.label(number), problem, _problem_remedy(exam.reports.ranks[number]))
        elif versions_agree(exam):  # otherwise the version checks report it
            what, _, remedy = problem.removeprefix(DIFFERS).rpartition("; ")
            yield Finding(True, "ringattn", f"differs: {what}", remedy)


def _unfinished_ranks(exam: Examination) -> Iterator[Finding]:
    """Ranks that ended early without a report of the problem."""
    if exam.launch_problem or _none_started(exam) or exam.exit_status is None or exam.reports.failed_connections:
        return
    ended = {n: rank.doing for n, rank in exam.reports.ranks.items() if not (rank.done or rank.problem)}
    if ended:
        what = f"ended while {join_words(list(ended.values()))}{_because(exam)}"
        yield Finding(True, exam.label(*ended), what, "run ringattn verify there, and see what its system log says")


def _none_started(exam: Examination) -> bool:
    """Whether the launch ended before any rank started."""
    return not any(number in exam.reports.ranks for number in range(exam.size)) and exam.exit_status is not None


def _because(exam: Examination) -> str:
    return f" ({exam.launcher_message})" if exam.launcher_message else ""


def _problem_remedy(rank: RankReport) -> str:
    """Advice for a problem that a rank reported."""
    if rank.doing.startswith("connecting"):
        return "look at the firewall of the machine that starts the ranks, and at the route there"
    if rank.doing.startswith("measuring"):
        return "look at that link: its cable, its interface, its addresses, the firewalls"
    return f"see whether MPI works there: {INSTALL}"


def _start_remedy(exam: Examination, *numbers: int) -> str:
    """Advice for ranks that did not start."""
    hosts = list(dict.fromkeys(exam.hosts[number] for number in numbers if number < len(exam.hosts)))
    # One host may keep all ranks from starting; the launcher's message may name it.
    named = [
        host for host in hosts if re.search(rf"(?<![\w.@-]){re.escape(host)}(?![\w-]|\.\w)", exam.launcher_message)
    ]
    if not hosts:
        return "see whether python -c 'import ringattn' works"
    names = " / ".join(named or hosts)
    return f"see whether `ssh {names} true` works without a password, and ringattn is installed there"


def _names(message: str, host: str) -> bool:
    """Whether a message names this host, and not only one whose name contains it."""
    return bool(re.search(rf"(?<![\w.@-]){re.escape(host)}(?![\w-]|\.\w)", message))


def _thread_levels(exam: Examination) -> Iterator[Finding]:
    """Ranks whose MPI does not support calls from several threads."""
    for number, rank in exam.reports.ranks.items():
        if rank.mpi and rank.mpi.threads != "multiple":
            what = f"MPI gives thread level {rank.mpi.threads!r}, and rings need 'multiple'"
            remedy = f"unset MPI4PY_RC_THREAD_LEVEL, or use an MPI that has it: {INSTALL}"
            yield Finding(True, exam.label(number), what, remedy)


def _other_mpiexec(exam: Examination) -> Iterator[Finding]:
    """Ranks that do not see the others: the mpiexec of another MPI starts every rank as a job of its own."""
    if exam.mpi_mismatch:
        return  # `_launch` reports it
    for number, rank in exam.reports.ranks.items():
        if rank.mpi and rank.mpi.size != exam.size:
            what = f"{rank.mpi.version} sees {rank.mpi.size} of {exam.size} ranks: mpiexec belongs to another MPI"
            remedy = "keep one MPI per virtual environment, or give --mpiexec"
            yield Finding(True, exam.label(number), what, remedy)


def versions_agree(exam: Examination) -> bool:
    """Whether all hosts have the same version of ringattn, as far as is known."""
    return len({rank.host.ringattn for rank in exam.reports.ranks.values() if rank.host}) < 2


CHECKS = (
    _hosts,
    _connections,
    _launch,
    _missing_ranks,
    _failed_ranks,
    _unfinished_ranks,
    _thread_levels,
    _other_mpiexec,
)

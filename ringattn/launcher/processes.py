"""Processes of this machine: identity, computing time, signals, cores. Standard library only."""

from __future__ import annotations

import os
import sys
import time


def start_time(pid: int) -> str | None:
    """The start time of the process `pid`, as the system formats it; ``None`` if it does not run, or is a zombie.

    A pid with its start time identifies a process; the system may give the pid alone to another process later.
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
    """Seconds of computing of all threads of the process `pid`; ``None`` if no such process runs."""
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
    """Send a signal to the process group that `pid` leads, or to `pid` alone if it leads none. Ignore a failure."""
    for send in (os.killpg, os.kill):
        try:
            send(pid, number)
            return
        except OSError:
            continue


def available_cores() -> int:
    """The number of cores that this process may run on; a container or taskset can allow fewer than all."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

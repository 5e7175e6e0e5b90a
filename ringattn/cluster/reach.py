"""Whether hosts can be reached and have what ranks need, asked of all of them at once before anything starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .hosts import Host
from .mpiexec import SSH_OPTIONS, LaunchError
from .ranks import is_here

PATIENCE = 15.0  # s for a host to answer
_NEEDED = {sys.executable: "Python", str(Path(__file__).with_name("rank.py")): "ringattn"}


def check_hosts(hosts: Sequence[Host]) -> None:
    """Raise `LaunchError` unless every host lets this user in and has Python and ringattn where they are here."""
    others = [host for host in hosts if not is_here(host.address)]
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        troubles = [trouble for trouble in pool.map(_trouble, others) if trouble]
    if troubles:
        raise LaunchError("; ".join(troubles))


def _trouble(host: Host) -> str | None:
    """What is wrong with a host, and what to do about it."""
    asked = "; ".join(f"test -e {shlex.quote(path)} || echo {shlex.quote(path)}" for path in _NEEDED)
    try:
        line = ["ssh", *SSH_OPTIONS, "--", host.ssh, asked]
        shown = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"host {host.ssh}: no answer within {PATIENCE:g} s; is it on, and on this network?"
    except OSError as error:
        return f"ssh: {error.strerror}"
    if shown.returncode == 255:
        said = (shown.stderr.strip().splitlines() or ["ssh failed"])[-1]
        return f"host {host.ssh}: {said}; 'ssh {host.ssh}' must work without a password"
    missing = [path for path in shown.stdout.splitlines() if path in _NEEDED]
    if missing:
        return f"host {host.ssh}: no {_NEEDED[missing[0]]} at {missing[0]}; install it at the same path as here"
    return None

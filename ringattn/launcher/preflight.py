"""Checks before a start, on all hosts at once: this user can log in, and Python, ringattn and MPI are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import LaunchError
from ..transport.addresses import is_here, own_address_towards
from .hostfile import Host
from .mpiexec import SSH_OPTIONS, Mpiexec

ANSWER_TIMEOUT = 15.0  # s for a host to answer
_MARK = "ringattn-lacks:"  # before each answer: a shell's own start-up files may print other lines
_HELPERS = {"MPICH": "hydra_pmi_proxy", "Open MPI": "prted"}  # the program beside mpiexec that it starts on every host
_WRAPPER = str(Path(__file__).with_name("rank_wrapper.py"))
_OFF = "check that it is on, and on this network"
_REMEDIES = {  # an error of ssh -> what the user can do
    r"Permission denied|Too many authentication": "'ssh {host}' must work without a password: ssh-copy-id {host}",
    r"Host key verification": "run 'ssh {host}' once and confirm its key: ssh may ask no question later",
    r"Could not resolve": "check the name, or give an address",
    r"Connection refused": "check that its sshd runs (on a Mac: System Settings > General > Sharing > Remote Login)",
    r"timed out|No route|is down|unreachable": _OFF,
}


@dataclass(frozen=True)
class Trouble:
    """The reason why ranks cannot run on a host.

    Attributes:
        host: The host.
        what: The problem, as the host or ssh describes it.
        remedy: Advice for the user.
    """

    host: Host
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"host {self.host.ssh}: {self.what}; {self.remedy}"


class _Need(NamedTuple):
    test: str  # in shell
    lacking: str
    remedy: str


def check_hosts(hosts: Sequence[Host], mpiexec: Mpiexec, interface: str | None = None) -> None:
    """Raise `LaunchError`, in one line, if `find_troubles` finds any."""
    if troubles := find_troubles(hosts, mpiexec, interface):
        raise LaunchError("; ".join(map(str, troubles)))


def find_troubles(hosts: Sequence[Host], mpiexec: Mpiexec, interface: str | None = None) -> list[Trouble]:
    """Find at most one trouble for each host.

    A host without one lets this user in, and has Python, ringattn and MPI at the same paths as this machine.

    Args:
        hosts: At least one. This machine may be among them; it is checked without ssh.
        mpiexec: The mpiexec that will start the ranks.
        interface: A network interface that every host must have.
    """
    needs = _needs(mpiexec, interface)
    with ThreadPoolExecutor(len(hosts)) as pool:
        return [trouble for trouble in pool.map(lambda host: _ask(host, needs), hosts) if trouble]


def home_address(hosts: Sequence[Host]) -> str:
    """Find the address at which the hosts reach this machine. IPv4, as all addresses that MPI gets.

    Raises:
        LaunchError: No address is found, though one of the hosts is another machine.
    """
    others = [host.address for host in hosts if not is_here(host.address)]
    found = [own_address_towards(address) for address in others or [host.address for host in hosts]]
    if home := next(filter(None, found), None):
        return home
    if not others:
        return "127.0.0.1"
    raise LaunchError(
        f"hosts {', '.join(others)}: the address at which they reach this machine cannot be found; "
        "give their addresses, or names that resolve here and not in ssh's configuration alone"
    )


def _needs(mpiexec: Mpiexec, interface: str | None) -> list[_Need]:
    needed = {sys.executable: "Python", _WRAPPER: "ringattn"}
    helper = os.path.join(os.path.dirname(mpiexec.path), _HELPERS[mpiexec.flavour])
    if os.path.exists(helper):  # packages of the system may have it elsewhere
        needed[helper] = mpiexec.flavour
    same = "install it at the same path as here"
    needs = [_Need(f"test -e {shlex.quote(path)}", f"no {what} at {path}", same) for path, what in needed.items()]
    if interface is not None:
        name = shlex.quote(interface)
        # Linux has the folder, macOS has ifconfig; ssh's PATH often lacks the folder of ifconfig.
        test = f"{{ test -e /sys/class/net/{name} || PATH=$PATH:/sbin:/usr/sbin ifconfig {name}; }} >/dev/null 2>&1"
        remedy = "give the --interface that connects the hosts; it must have the same name on all of them"
        needs.append(_Need(test, f"no network interface {interface!r}", remedy))
    return needs


def _ask(host: Host, needs: Sequence[_Need]) -> Trouble | None:
    """Check one host."""
    lines = [f"{need.test} || echo {_MARK}{number}" for number, need in enumerate(needs)]
    script = "\n".join([*lines, f"echo {_MARK}"])
    line = ["sh", "-c", script]
    if not is_here(host.address):  # sh, whichever shell the user has there
        line = ["ssh", *SSH_OPTIONS, "--", host.ssh, f"sh -c {shlex.quote(script)}"]
    try:
        shown = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_TIMEOUT)
    except subprocess.TimeoutExpired:
        return Trouble(host, f"no answer within {ANSWER_TIMEOUT:g} s", _OFF)
    except OSError as error:
        return Trouble(host, f"{line[0]}: {error.strerror}", f"install {line[0]} here")
    answers = [line.removeprefix(_MARK) for line in shown.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        return _login_trouble(host, shown)
    lacking = next((needs[int(answer)] for answer in answers if answer), None)
    return lacking and Trouble(host, lacking.lacking, lacking.remedy)


def _login_trouble(host: Host, shown: subprocess.CompletedProcess[str]) -> Trouble:
    """The reason why a host gave no answer, from the output of ssh."""
    last_line = (
        shown.stderr.strip() or shown.stdout.strip() or f"ssh ended with code {shown.returncode}"
    ).splitlines()[-1]
    remedies = (remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, last_line))
    remedy = next(remedies, "run 'ssh {host} true' and read its message")
    return Trouble(host, last_line, remedy.format(host=host.ssh))

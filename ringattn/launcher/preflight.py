"""Whether hosts can be reached and have what ranks need, asked of all of them at once before anything starts."""

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

PATIENCE = 15.0  # s for a host to answer
_MARK = "ringattn-lacks:"  # before each answer: what a shell's own start-up files print is none
_HELPERS = {"MPICH": "hydra_pmi_proxy", "Open MPI": "prted"}  # what mpiexec starts on every host, beside its own place
_WRAPPER = str(Path(__file__).with_name("rank_wrapper.py"))
_OFF = "see whether it is on, and on this network"
_REMEDIES = {  # what ssh says of a host -> what to do about it
    r"Permission denied|Too many authentication": "'ssh {host}' must work without a password: ssh-copy-id {host}",
    r"Host key verification": "call 'ssh {host}' once and look at its key: nothing may be asked later",
    r"Could not resolve": "see whether the name is right, or give an address",
    r"Connection refused": "see whether its sshd runs (on a Mac: System Settings > General > Sharing > Remote Login)",
    r"timed out|No route|is down|unreachable": _OFF,
}


@dataclass(frozen=True)
class Trouble:
    """What keeps ranks from running on a host.

    Attributes:
        host: Which.
        what: What is wrong, in its or ssh's words.
        remedy: What to do about it.
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
    """Raise `LaunchError`, in one line, where `find_troubles` finds any."""
    if troubles := find_troubles(hosts, mpiexec, interface):
        raise LaunchError("; ".join(map(str, troubles)))


def find_troubles(hosts: Sequence[Host], mpiexec: Mpiexec, interface: str | None = None) -> list[Trouble]:
    """At most one trouble for each host.

    There is none where it lets this user in, and has Python, ringattn and MPI where they are here.

    Args:
        hosts: At least one. This machine may be among them, and is not asked by ssh.
        mpiexec: The one that will start the ranks.
        interface: A network interface that every host has to have.
    """
    needs = _needs(mpiexec, interface)
    with ThreadPoolExecutor(len(hosts)) as pool:
        return [trouble for trouble in pool.map(lambda host: _ask(host, needs), hosts) if trouble]


def home_address(hosts: Sequence[Host]) -> str:
    """The address of this machine at which the hosts reach it. IPv4, as all that MPI is told.

    Raises:
        LaunchError: It cannot be found, though one of the hosts is another machine.
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
    if os.path.exists(helper):  # a system's own packages may keep it elsewhere
        needed[helper] = mpiexec.flavour
    same = "install it at the same path as here"
    needs = [_Need(f"test -e {shlex.quote(path)}", f"no {what} at {path}", same) for path, what in needed.items()]
    if interface is not None:
        name = shlex.quote(interface)
        # Linux has the first, macOS the second; ssh's PATH often lacks the folder of the second.
        test = f"{{ test -e /sys/class/net/{name} || PATH=$PATH:/sbin:/usr/sbin ifconfig {name}; }} >/dev/null 2>&1"
        remedy = "give the --interface that leads to the other hosts, which must have the same name on all"
        needs.append(_Need(test, f"no network interface {interface!r}", remedy))
    return needs


def _ask(host: Host, needs: Sequence[_Need]) -> Trouble | None:
    """What is wrong with a host, and what to do about it."""
    lines = [f"{need.test} || echo {_MARK}{number}" for number, need in enumerate(needs)]
    script = "\n".join([*lines, f"echo {_MARK}"])
    line = ["sh", "-c", script]
    if not is_here(host.address):  # whichever shell its user has
        line = ["ssh", *SSH_OPTIONS, "--", host.ssh, f"sh -c {shlex.quote(script)}"]
    try:
        shown = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Trouble(host, f"no answer within {PATIENCE:g} s", _OFF)
    except OSError as error:
        return Trouble(host, f"{line[0]}: {error.strerror}", f"install {line[0]} here")
    answers = [line.removeprefix(_MARK) for line in shown.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        return _not_asked(host, shown)
    lacking = next((needs[int(answer)] for answer in answers if answer), None)
    return lacking and Trouble(host, lacking.lacking, lacking.remedy)


def _not_asked(host: Host, shown: subprocess.CompletedProcess[str]) -> Trouble:
    """Why a host did not come to answer."""
    said = (shown.stderr.strip() or shown.stdout.strip() or f"ssh ended with code {shown.returncode}").splitlines()[-1]
    remedies = (remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, said))
    remedy = next(remedies, "see what 'ssh {host} true' says")
    return Trouble(host, said, remedy.format(host=host.ssh))

"""Virtual hosts: create them, run commands beside them, and remove them completely."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STATE = Path("/run/ringattn-virtual")  # a folder for each cluster with its owner's pid and the replacement of ssh
# TCP congestion control of a Mac, whatever this machine uses. BBR would leave a tenth of a link unused on which blocks
# go one way and acknowledgements the other.
CONGESTION = ("congctl", "cubic")
BURST = "256kb"  # of the links' token buckets: more than the largest segment that the kernel passes on at once
MPICH_VARIABLES = {  # these hosts share a kernel, but no memory, and have one interface for their names
    "MPIR_CVAR_NOLOCAL": "1",
    "FI_TCP_IFACE": "eth0",
}
_count = itertools.count(1)


def unavailable() -> str | None:
    """Reason why this machine can have no virtual cluster, in one line with the remedy; ``None`` if it can."""
    if os.uname().sysname != "Linux":
        return "a virtual cluster needs Linux: run it in a virtual machine"
    if os.geteuid() != 0:
        return "a virtual cluster needs root: run it with sudo"
    missing = [name for name in ("ip", "tc", "unshare", "taskset") if shutil.which(name) is None]
    if missing:
        return f"a virtual cluster needs {' and '.join(missing)}: install iproute2 and util-linux"
    tried = subprocess.run(["unshare", "-n", "-u", "true"], capture_output=True, text=True)
    return f"a virtual cluster needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Context manager for hosts on one bridge. Its exit removes everything.

    Args:
        hosts: Number of hosts, 1 to 200.
        rate: Rate of each host's link, separately each way, in units of tc (``"1gbit"``); ``None``: no limit.
        memory: Memory of each host (``"2G"``, ``"512M"``); ``None``: no limit.
        cores: Number of cores of each host, assigned in turn; ``None``: all hosts share all cores.
        ring: Whether to join each host to the next by a cable of its own, and the last to the first, like Macs on
            Thunderbolt. Neighbours then reach each other over these cables alone, and `rate` is theirs. Needs 3 hosts.

    Attributes:
        names: Host names, which processes there see as their own.
        addresses: Addresses of the hosts, for `ssh`.
        bridge: Interface over which this machine reaches the hosts.
        environment: Environment for commands that start ranks: PATH with the replacement of ssh, RINGATTN_HOSTS, and
            settings of MPI.
    """

    def __init__(
        self,
        hosts: int = 2,
        rate: str | None = None,
        memory: str | None = None,
        cores: int | None = None,
        ring: bool = False,
    ):
        if not (3 if ring else 1) <= hosts <= 200:
            raise ValueError(f"hosts: {hosts}, expected {3 if ring else 1} to 200")
        self._bytes = None if memory is None else _parse_bytes(memory)
        if cores is not None and not 1 <= cores <= os.cpu_count():
            raise ValueError(f"cores: {cores}, expected 1 to {os.cpu_count()}")
        self._rate = rate
        self._cores = cores
        self._ring = ring
        self._name = f"ra{os.getpid()}x{next(_count)}"
        self.bridge = self._name
        self._folder = STATE / self._name
        self.names = [f"mac{i}" for i in range(hosts)]
        subnet = _free_subnet()
        self.head = f"{subnet}.254"
        self.addresses = [f"{subnet}.{i + 1}" for i in range(hosts)]
        self.environment = {
            **os.environ,
            **MPICH_VARIABLES,
            "PATH": f"{self._folder}:{os.environ['PATH']}",
            "RINGATTN_HOSTS": ",".join(self.addresses),
            "RINGATTN_BRIDGE": self.bridge,
        }

    def __enter__(self) -> Cluster:
        clean()
        self._folder.mkdir(parents=True)
        (self._folder / "owner").write_text(f"{os.getpid()} {_start_time(os.getpid())}")
        try:
            self._make()
        except BaseException:
            _remove(self._name)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._name)

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        """Run a command by `subprocess.run` on this machine, from which the hosts can be reached."""
        return subprocess.run(list(command), env=self.environment, **options)

    def processes(self) -> list[int]:
        """Pids of the processes on all hosts."""
        return [pid for i in range(len(self.names)) for pid in _processes(self._host(i))]

    def unplug(self, host: int) -> None:
        """Disconnect a host from the bridge."""
        _do("ip", "link", "set", self._cable(host), "down")

    def plug(self, host: int) -> None:
        """Connect a host to the bridge again."""
        _do("ip", "link", "set", self._cable(host), "up")

    def sent(self, host: int) -> int:
        """Bytes that a host has sent over its cable to the bridge."""
        return int(Path(f"/sys/class/net/{self._cable(host)}/statistics/rx_bytes").read_text())

    def set_rate(self, rate: str | None) -> None:
        """Change the rate of all links; ``None``: no limit."""
        for i in range(len(self.names)):
            inside = ("-n", self._host(i))
            ends: list[tuple[str, tuple[str, ...]]] = [(self._cable(i), ()), ("eth0", inside)]
            if self._ring:
                ends = [("left", inside), ("right", inside)]
            for at, where in ends:
                if rate is None:
                    subprocess.run(["tc", *where, "qdisc", "del", "dev", at, "root"], capture_output=True)
                else:
                    bucket = ("tbf", "rate", rate, "burst", BURST, "latency", "50ms")
                    _do("tc", *where, "qdisc", "replace", "dev", at, "root", *bucket)

    def _host(self, host: int) -> str:
        return f"{self._name}h{host}"

    def _cable(self, host: int) -> str:
        return f"{self._name}v{host}"

    def _make(self) -> None:
        _do("ip", "link", "add", self.bridge, "type", "bridge")
        _do("ip", "addr", "add", f"{self.head}/24", "dev", self.bridge)
        _do("ip", "link", "set", self.bridge, "up")
        for i in range(len(self.names)):
            self._make_host(i)
        for i in range(len(self.names) if self._ring else 0):
            self._join(i, (i + 1) % len(self.names))
        if self._rate is not None:
            self.set_rate(self._rate)
        script = self._folder / "ssh"
        script.write_text(self._ssh())
        script.chmod(0o755)

    def _make_host(self, i: int) -> None:
        host = self._host(i)
        cable = self._cable(i)
        _do("ip", "netns", "add", host)
        _do("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host)
        _do("ip", "link", "set", cable, "master", self.bridge, "up")
        _do("ip", "-n", host, "addr", "add", f"{self.addresses[i]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", host, "link", "set", device, "up")
        subnet = f"{self.addresses[i].rpartition('.')[0]}.0/24"
        source = ("src", self.addresses[i])
        _do("ip", "-n", host, "route", "change", subnet, "dev", "eth0", *source, *CONGESTION)
        known = Path("/etc/netns", host)  # ip netns exec puts it over /etc
        known.mkdir(parents=True)
        lines = [f"{a} {n}" for a, n in zip(self.addresses, self.names)]
        (known / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        if self._bytes is not None:
            group, limit = _memory_group(host)
            group.mkdir()
            (group / limit).write_text(str(self._bytes))

    def _join(self, host: int, other: int) -> None:
        """Create a cable between two hosts, over which they reach each other's address."""
        spaces = self._host(host), self._host(other)
        _do("ip", "-n", spaces[0], "link", "add", "right", "type", "veth", "peer", "name", "left", "netns", spaces[1])
        ends = ((host, "right", other), (other, "left", host))
        for at, device, _ in ends:
            _do("ip", "-n", self._host(at), "link", "set", device, "up")
        for at, device, to in ends:
            source = ("src", self.addresses[at])
            neighbour = f"{self.addresses[to]}/32"
            _do("ip", "-n", self._host(at), "route", "add", neighbour, "dev", device, *source, *CONGESTION)

    def _ssh(self) -> str:
        """Script with the part of ssh that launchers use.

        A remote shell gets the command as one string, in a clean environment.
        """
        cases = "\n".join(self._case(i) for i in range(len(self.names)))
        return f"""#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -[BbcDEeFIiJLlmOopQRSWw]) shift 2 ;;
        --) shift; break ;;
        -*) shift ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || {{ echo "usage: ssh [options] host command" >&2; exit 255; }}
host="${{1##*@}}"; shift
[ "$1" = "--" ] && shift
case "$host" in
{cases}
    *) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
esac
if ip link show "$cable" | grep -q "state DOWN"; then
    echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255
fi
[ -z "$group" ] || echo $$ > "$group/cgroup.procs"
exec env -i $memory HOME="$HOME" USER="$USER" SHELL=/bin/sh PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \\
    SSH_CONNECTION="{self.head} 40000 $address 22" taskset -c "$cores" ip netns exec "$space" \\
    unshare -u sh -c 'hostname "$0"; cd; exec sh -c "$1"' "$name" "$*"
"""

    def _case(self, i: int) -> str:
        known = sorted(os.sched_getaffinity(0))
        own = known if self._cores is None else [known[(i * self._cores + j) % len(known)] for j in range(self._cores)]
        group = "" if self._bytes is None else str(_memory_group(self._host(i))[0])
        values = {
            "name": self.names[i],
            "address": self.addresses[i],
            "space": self._host(i),
            "cable": self._cable(i),
            "cores": ",".join(map(str, own)),
            "group": group,
            # The limit, which ringattn would find itself, but a network namespace hides the files of cgroups.
            "memory": "" if self._bytes is None else f"RINGATTN_MEMORY={self._bytes}",
        }
        assignments = "; ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
        return f"    {self.names[i]}|{self.addresses[i]}) {assignments} ;;"


def clean() -> None:
    """Remove the clusters whose owners have ended."""
    for folder in STATE.glob("ra*x*") if STATE.is_dir() else ():
        pid, _, started = (
            (folder / "owner").read_text().partition(" ") if (folder / "owner").exists() else ("0", "", "")
        )
        if _start_time(int(pid)) != started or not started:
            _remove(folder.name)


def _remove(name: str) -> None:
    """End all processes on the cluster's hosts and remove the cluster, even if it is incomplete."""
    ours = re.compile(rf"{name}h\d+")
    hosts = [path.name for path in Path("/run/netns").glob(f"{name}h*") if ours.fullmatch(path.name)]
    end = time.monotonic() + 5
    while any(_kill(host) for host in hosts) and time.monotonic() < end:
        time.sleep(0.05)
    for host in hosts:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
        shutil.rmtree(Path("/etc/netns", host), ignore_errors=True)
        group = _memory_group(host)[0]
        if group.is_dir():
            group.rmdir()
    # The kernel removes a host's end of a cable only some time after the end of the host's last process.
    for link in [*(path.name for path in Path("/sys/class/net").glob(f"{name}v*")), name]:
        subprocess.run(["ip", "link", "del", link], capture_output=True)
    shutil.rmtree(STATE / name, ignore_errors=True)


def _kill(host: str) -> bool:
    """Kill all processes on a host. Return whether there were any."""
    found = list(_processes(host))
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return bool(found)


def _processes(host: str) -> Iterator[int]:
    shown = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    return map(int, shown.stdout.split())


def _memory_group(host: str) -> tuple[Path, str]:
    """Cgroup of a host, and the name of the file with its limit, for cgroups of version 1 or 2."""
    first = Path("/sys/fs/cgroup/memory")
    return (first / host, "memory.limit_in_bytes") if first.is_dir() else (first.parent / host, "memory.max")


def _free_subnet() -> str:
    """First three numbers of a network that this machine does not use."""
    used = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True).stdout
    numbers = (f"10.{200 + i // 250}.{i % 250}" for i in range(os.getpid() % 1000, 12000))
    return next(number for number in numbers if f" {number}." not in used)


def _start_time(pid: int) -> str:
    """Start time of a process; empty if there is none with this pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _parse_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not found or not int(found[1]):
        raise ValueError(f"memory: {text!r}, expected a number with K, M or G behind it")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)

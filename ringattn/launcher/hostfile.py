"""Hosts that ranks run on, from the command line and the host files of MLX, MPICH and Open MPI."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import LaunchError

# A name or an address, perhaps with a user before it. No character that ssh or a shell would interpret.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The keys of MLX's files. "rdma" is for groups of `mx.distributed` (`ringattn.grid`); MPI cannot use it.
_KEYS = ("hosts", "backend", "envs")
_HOST_KEYS = ("ssh", "ips", "rdma", "slots")


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes.

    Attributes:
        ssh: The destination for ssh: an address or a name, perhaps with a user before it.
        slots: The number of ranks, at most.
        rdma: Its RDMA devices towards each host, as in MLX's files: a name, several names or ``None``.
    """

    ssh: str
    slots: int = 1
    rdma: tuple[Any, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.ssh, str) or not _NAME.fullmatch(self.ssh):
            raise LaunchError(f"host: {self.ssh!r}, expected a name or an address, perhaps with a user before it")
        if type(self.slots) is not int or self.slots < 1:
            raise LaunchError(f"host {self.ssh}: {self.slots!r} slots, expected a number above 0")

    @property
    def address(self) -> str:
        """The address or name without the user."""
        return self.ssh.rpartition("@")[2]


@dataclass(frozen=True)
class Cluster:
    """All hosts, in the order of the ring, and the other settings of a host file.

    Attributes:
        hosts: At least one.
        variables: ``NAME=VALUE`` for the environment of all ranks.
        backend: The backend of the ranks' messages, as ``mlx.launch`` names it; ``None`` if none is given.
    """

    hosts: tuple[Host, ...]
    variables: tuple[str, ...] = ()
    backend: str | None = None

    @property
    def slots(self) -> int:
        return sum(host.slots for host in self.hosts)


def parse_hosts(text: str) -> Cluster:
    """Parse hosts such as ``a,b:2,user@c``.

    Raises:
        LaunchError: A part is no host, or a host is there twice.
    """
    return _distinct("--hosts", [_host("--hosts", part.strip()) for part in text.split(",")])


def read_hostfile(path: str | Path) -> Cluster:
    """Read a host file: MLX's JSON, or a line for each host, ``a``, ``a:2`` (MPICH) or ``a slots=2`` (Open MPI).

    Raises:
        LaunchError: The file cannot be read, or an entry is wrong; the message names file and place.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise LaunchError(f"--hostfile: {path}: {why}") from None
    if text.lstrip()[:1] in ("[", "{"):
        return _parse_json(str(path), text)
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        if words := re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split():
            hosts.append(_parse_line(f"{path}, line {number}", words))
    return _distinct(str(path), hosts)


def check_variable(name: str, text: str) -> str:
    """Return `text` if it is ``NAME=VALUE``. `name` is the option or file that it comes from."""
    variable, equals, _ = text.partition("=")
    if not equals or not _VARIABLE.fullmatch(variable) or "\0" in text:
        raise LaunchError(f"{name}: {text!r}, expected NAME=VALUE")
    return text


def _host(where: str, text: str, slots: Any = None, default: int = 1) -> Host:
    """Parse ``HOST`` or ``HOST:SLOTS``. `slots` is their number as given elsewhere."""
    name, colon, number = text.partition(":")
    if ":" in number:
        why = "expected HOST or HOST:SLOTS; the host lists of MPI take no IPv6 address: use a name or an IPv4 address"
        raise LaunchError(f"{where}: {text!r}, {why}")
    if colon and not number.isdecimal():
        raise LaunchError(f"{where}: {text!r}, expected HOST or HOST:SLOTS")
    if colon and slots not in (None, int(number)):
        raise LaunchError(f"{where}: {text!r} with slots {slots!r}, expected the slots once")
    try:
        return Host(name, int(number) if colon else default if slots is None else slots)
    except LaunchError as error:
        raise LaunchError(f"{where}: {error}") from None


def _parse_line(where: str, words: list[str]) -> Host:
    numbers: dict[str, int] = {}
    for word in words[1:]:
        key, _, value = word.replace("-", "_").partition("=")
        if key not in ("slots", "max_slots") or not value.isdecimal():
            raise LaunchError(f"{where}: {word!r}, expected slots=N")
        if key in numbers:
            raise LaunchError(f"{where}: {key} is there twice, expected it once")
        numbers[key] = int(value)
    most = numbers.get("max_slots")
    host = _host(where, words[0], numbers.get("slots"), default=most or 1)
    if most is not None and host.slots > most:
        raise LaunchError(f"{where}: {host.slots} slots with max_slots={most}, expected no more than that")
    return host


def _parse_json(path: str, text: str) -> Cluster:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise LaunchError(f"{path}: not JSON: {error}") from None
    table = found if isinstance(found, dict) else {"hosts": found}
    _check_keys(path, table, _KEYS)
    entries = table.get("hosts")
    variables = table.get("envs") or []
    if not isinstance(entries, list) or not isinstance(variables, list):
        raise LaunchError(f"{path}: expected a list of hosts, or an object with 'hosts' and 'envs', which are lists")
    backend = table.get("backend", "")
    if not isinstance(backend, str):
        raise LaunchError(f"{path}: backend {backend!r}, expected a text such as 'mpi'")
    hosts = [_parse_entry(f"{path}, host {number}", entry) for number, entry in enumerate(entries)]
    checked = tuple(check_variable(f"{path}, envs", str(variable)) for variable in variables)
    return Cluster(_distinct(path, hosts).hosts, checked, backend or None)


def _parse_entry(where: str, entry: Any) -> Host:
    if not isinstance(entry, dict) or not isinstance(entry.get("ssh"), str):
        raise LaunchError(f"{where}: {entry!r}, expected an object with 'ssh'")
    _check_keys(where, entry, _HOST_KEYS)
    rdma = entry.get("rdma") or []
    if not isinstance(rdma, list):
        raise LaunchError(f"{where}: rdma {rdma!r}, expected a list with a device, or null, for each host")
    return replace(_host(where, _destination(where, entry), entry.get("slots")), rdma=tuple(rdma))


def _check_keys(where: str, table: dict[str, Any], known: Sequence[str]) -> None:
    if unknown := next((key for key in table if key not in known), None):
        raise LaunchError(f"{where}: {unknown!r}, expected {', '.join(known)}")


def _destination(where: str, entry: dict[str, Any]) -> str:
    """The destination for ssh: the first address, which is the one for the ranks' messages, or else the name."""
    addresses = entry.get("ips") or []
    if not isinstance(addresses, list) or not all(isinstance(one, str) for one in addresses):
        raise LaunchError(f"{where}: ips {addresses!r}, expected a list of addresses")
    user, at, _ = entry["ssh"].rpartition("@")
    return user + at + addresses[0] if addresses else str(entry["ssh"])


def _distinct(where: str, hosts: list[Host]) -> Cluster:
    if not hosts:
        raise LaunchError(f"{where}: no host, expected at least one")
    names = [host.ssh for host in hosts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LaunchError(f"{where}: {twice} is there twice, expected each host once, with its slots")
    return Cluster(tuple(hosts))

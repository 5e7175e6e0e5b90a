"""What lies in ``launch/`` for people: the Thunderbolt script's addresses and routes, and the host files."""

import ipaddress
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from spawn import ROOT

from launch.virtual import Cluster
from launch.virtual.cluster import STATE
from ringattn.launcher.hostfile import Host, read_hostfile

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPT = str(LAUNCH / "thunderbolt_ring.sh")
SIZES = range(2, 9)
SAMPLES = sorted(LAUNCH.glob("hostfile.*"))
RING = """
import mlx.core as mx
import ringattn as ra
with ra.init() as ring:
    total = ring.all_reduce(mx.array([ring.rank]))
    print(f"{ring.rank} {ring.hosts[ring.rank]} {total.item()}\\n", end="", flush=True)  # in one piece
"""


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=20)


def plan(rank: int, size: int, *more: str) -> str:
    done = script("--rank", rank, "--size", size, *more)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def addresses(text: str) -> dict[str, ipaddress.IPv4Interface]:
    """Of each interface."""
    found = re.findall(r"^sudo ifconfig (\w+) inet (\S+) netmask (\S+) up$", text, re.MULTILINE)
    return {name: ipaddress.ip_interface(f"{address}/{mask}") for name, address, mask in found}


def routes(text: str) -> dict[str, str]:
    """Destination -> gateway."""
    return dict(re.findall(r"^sudo route -n add -host (\S+) (\S+)$", text, re.MULTILINE))


def known(text: str) -> str:
    """The address by which others know this Mac."""
    return re.search(r"^# rank \d of \d is (\S+)$", text, re.MULTILINE)[1]


def test_it_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


@pytest.mark.parametrize("size", SIZES)
def test_every_cable_has_a_subnet_of_its_own(size):
    ends = [addresses(plan(rank, size)) for rank in range(size)]
    cables = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else 1)]
    subnets = set()
    for a, b in cables:
        right, left = ends[a]["en3"], ends[b]["en3" if size == 2 else "en2"]
        assert right.network == left.network and right.ip != left.ip
        assert all(end.ip in list(end.network.hosts()) for end in (right, left))
        subnets.add(right.network)
    assert len(subnets) == len(cables)
    every = [end.ip for mine in ends for end in mine.values()]
    assert len(every) == len(set(every)) == 2 * len(cables)


@pytest.mark.parametrize("size", SIZES)
def test_every_mac_reaches_the_address_of_every_other(size):
    """Hop by hop along routes and cables, never the longer way round."""
    texts = [plan(rank, size) for rank in range(size)]
    owner = {str(end.ip): rank for rank in range(size) for end in addresses(texts[rank]).values()}
    for source in range(size):
        for target in range(size):
            at, hops = source, 0
            while at != target:
                address = known(texts[target])
                gateway = routes(texts[at]).get(address, address)
                assert any(ipaddress.ip_address(gateway) in end.network for end in addresses(texts[at]).values())
                at, hops = owner[gateway], hops + 1
            assert hops <= size // 2
            assert hops <= 1 or "sysctl -w net.inet.ip.forwarding=1" in texts[source]


def test_the_bridge_lets_go():
    text = plan(1, 3, "--left", "en5", "--right", "en6", "--mtu", "9000")
    lines = text.splitlines()
    assert lines[0] == r"sudo networksetup -setnetworkserviceenabled Thunderbolt\ Bridge off || true"
    for name in ("en5", "en6"):
        freed, addressed, framed = (
            next(i for i, line in enumerate(lines) if part in line)
            for part in (f"bridge0 deletem {name}", f"ifconfig {name} inet", f"ifconfig {name} mtu 9000")
        )
        assert freed < addressed < framed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--size: '', expected a number from 2 to 8"),
        (["--size", 1, "--rank", 0], "--size: 1, expected a number from 2 to 8"),
        (["--size", 9, "--rank", 0], "--size: 9, expected a number from 2 to 8"),
        (["--size", "3;ls", "--rank", 0], "--size: '3;ls', expected a number from 2 to 8"),
        (["--size", 3], "--rank: '', expected a number from 0 to 2"),
        (["--size", 3, "--rank", 3], "--rank: 3, expected a number from 0 to 2"),
        (["--size", 3, "--rank", "08"], "--rank: '08', expected a number from 0 to 2"),
        (["--size", 3, "--rank"], "--rank: nothing, expected a value"),
        (["--size", 3, "--rank", 0, "--left", "en3"], "--left and --right: both en3, expected the two ports"),
        (["--size", 3, "--rank", 0, "--left", "$(id)"], "--left: '$(id)', expected an interface such as en2"),
        (["--size", 3, "--rank", 0, "--mtu", 99], "--mtu: 99, expected a number from 1280 to 9000"),
        (["--sise", 3], "'--sise' is no option; usage: "),
    ],
)
def test_wrong_arguments_are_one_line(arguments, told):
    done = script(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {told}") and done.stderr.count("\n") == 1


@pytest.mark.skipif(Path("/System/Library").exists(), reason="this is a Mac, where it would be done")
def test_it_changes_nothing_elsewhere():
    done = script("--size", 3, "--rank", 0, "--apply")
    assert (done.returncode, done.stdout) == (2, "") and "expected macOS" in done.stderr


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_host_files_are_of_the_ring_that_the_script_makes(path):
    hosts = read_hostfile(path).hosts
    assert hosts == tuple(Host(known(plan(rank, len(hosts))), slots=1) for rank in range(len(hosts)))


def test_there_is_a_host_file_for_two_macs_and_for_three():
    assert {len(read_hostfile(path).hosts) for path in SAMPLES} == {2, 3}


# On hosts


@contextmanager
def cabled(size: int) -> Iterator[Cluster]:
    """Hosts whose only links are cables, with the addresses and routes that the script gives to Macs."""
    with Cluster(size) as cluster:
        spaces = [f"{cluster.bridge}h{rank}" for rank in range(size)]
        texts = [plan(rank, size) for rank in range(size)]
        for rank in range(size if size > 2 else 1):
            left = "en3" if size == 2 else "en2"
            other = ("peer", "name", left, "netns", spaces[(rank + 1) % size])
            ip("-n", spaces[rank], "link", "add", "en3", "type", "veth", *other)
        for space, text in zip(spaces, texts):
            ip("-n", space, "addr", "flush", "dev", "eth0")  # which leads to this machine
            for name, address in addresses(text).items():
                ip("-n", space, "addr", "add", str(address), "dev", name)
                ip("-n", space, "link", "set", name, "up")
        for space, text in zip(spaces, texts):
            for name in addresses(text):
                wait_until_up(space, name)  # before, MPI does not take the interface
            for destination, gateway in routes(text).items():
                ip("-n", space, "route", "add", destination, "via", gateway)
        yield cluster


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)
    return done.stdout


def wait_until_up(space: str, name: str) -> None:
    """Wait until the system has seen that a cable's other end is up, too."""
    end = time.monotonic() + 20
    while "state UP" not in ip("-n", space, "link", "show", "dev", name):
        assert time.monotonic() < end, f"{name} of {space} has no carrier"
        time.sleep(0.02)


def write_ssh(folder: Path, hosts: Sequence[str], real: str) -> None:
    """An `ssh` that knows the hosts by the addresses of their cables."""
    cases = "".join(f"{address}) word=mac{rank};; " for rank, address in enumerate(hosts))
    each = f'for word; do shift; case "$word" in {cases}esac; set -- "$@" "$word"; done'
    (folder / "ssh").write_text(f'#!/bin/sh\n{each}\nexec {real} "$@"\n')
    (folder / "ssh").chmod(0o755)


@pytest.mark.hosts
@pytest.mark.parametrize("name", ["hostfile.two-macs", "hostfile.three-macs"])
def test_a_job_on_hosts_with_the_addresses_of_the_script(tmp_path, name):
    """Started on the first of them, as the page says."""
    hosts = [host.address for host in read_hostfile(LAUNCH / name).hosts]
    program = tmp_path / "ring.py"
    program.write_text(RING)
    with cabled(len(hosts)) as cluster:
        write_ssh(tmp_path, hosts, str(STATE / cluster.bridge / "ssh"))
        environment = [
            f"PATH={tmp_path}:{Path(sys.executable).parent}:$PATH",
            f"PYTHONPATH={ROOT}",
            "MPIR_CVAR_NOLOCAL=1",
        ]
        line = [sys.executable, "-m", "ringattn.cli", "launch", "--hostfile", str(LAUNCH / name), "--interface", "en3"]
        job = shlex.join([*line, "--env", f"PYTHONPATH={ROOT}", "--no-prefix", "--", str(program)])
        done = cluster.run(["ssh", "mac0", *environment, job], capture_output=True, text=True, timeout=90)
    expected = [f"{rank} mac{rank} {sum(range(len(hosts)))}" for rank in range(len(hosts))]
    assert sorted(done.stdout.splitlines()) == expected and done.returncode == 0, done.stderr

"""Hosts: how they are named, and `ringattn launch` across several of them (the virtual cluster's)."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from spawn import ROOT, under_load

from launch.virtual import Cluster
from ringattn.cli import main
from ringattn.errors import LaunchError
from ringattn.launcher import mpiexec, preflight
from ringattn.launcher.hostfile import Host, parse_hosts, read_hostfile
from ringattn.launcher.mpiexec import Mpiexec, find_mpiexec
from ringattn.launcher.processes import start_time

# Names


def test_hosts_and_slots() -> None:
    assert parse_hosts("a, me@b:3,10.0.0.1").hosts == (Host("a"), Host("me@b", 3), Host("10.0.0.1"))
    assert parse_hosts("a:2,b").slots == 3


@pytest.mark.parametrize(
    "text, hosts, variables, backend",
    [
        ("# ring\na\nb:2  # two\n\n", (Host("a"), Host("b", 2)), (), None),
        ("a slots=2 max_slots=4\nb slots=1\n", (Host("a", 2), Host("b")), (), None),
        (
            "\ufeffa slots = 2 max-slots= 4\r\nb max_slots=3\nc:2 slots=2",
            (Host("a", 2), Host("b", 3), Host("c", 2)),
            (),
            None,
        ),
        (
            '[{"ssh": "me@a", "ips": ["10.0.0.1"]}, {"ssh": "b", "rdma": [null]}]',
            (Host("me@10.0.0.1"), Host("b")),
            (),
            None,
        ),
        (
            '\ufeff{"backend": "ring", "envs": ["A=1 $(b)"], "hosts": [{"ssh": "a", "ips": [], "slots": 3}]}',
            (Host("a", 3),),
            ("A=1 $(b)",),
            "ring",
        ),
        ('{"backend": "", "hosts": [{"ssh": "a"}]}', (Host("a"),), (), None),
    ],
)
def test_host_files(
    tmp_path: Path, text: str, hosts: tuple[Host, ...], variables: tuple[str, ...], backend: str | None
) -> None:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    found = read_hostfile(path)
    assert (found.hosts, found.variables, found.backend) == (hosts, variables, backend)


@pytest.mark.parametrize(
    "text, told",
    [
        ("a b\n", "hosts, line 1: 'b', expected slots=N"),
        ("\na:x\n", "hosts, line 2: 'a:x', expected HOST or HOST:SLOTS"),
        ("a:0", "host a: 0 slots, expected a number above 0"),
        ("a:2 slots=3", "line 1: 'a:2' with slots 3, expected the slots once"),
        ("a slots=3 slots=3", "line 1: slots is there twice"),
        ("a slots=3 max_slots=2", "line 1: 3 slots with max_slots=2, expected no more"),
        ("a = 2", "line 1: host: 'a=2', expected a name"),
        ("fe80::1", "line 1: 'fe80::1', expected HOST or HOST:SLOTS; the host lists of MPI take no IPv6 address"),
        ("a:1:2", "line 1: 'a:1:2', expected HOST or HOST:SLOTS; the host lists of MPI take no IPv6"),
        ('[{"ssh": "a", "ips": ["::1"]}]', "host 0: '::1', expected HOST or HOST:SLOTS; the host lists of MPI"),
        ('[{"ssh": "a", "slots": true}]', "host a: True slots, expected a number"),
        ('[{"ssh": "a", "slots": "2"}]', "host a: '2' slots, expected a number"),
        ('[{"ssh": "a", "port": 22}]', "host 0: 'port', expected ssh, ips, rdma, slots"),
        ('{"hosts": [{"ssh": "a"}], "env": []}', "hosts: 'env', expected hosts, backend, envs"),
        ('{"hosts": [{"ssh": "a"}], "backend": 3}', "hosts: backend 3, expected a text such as 'mpi'"),
        ('{"hosts": [{"ssh": "a"}], "backend": null}', "hosts: backend None, expected a text"),
        ("a\na\n", "a is there twice"),
        ("# none\n", "no host, expected at least one"),
        ("-oProxyCommand=x", "host: '-oProxyCommand=x', expected a name"),
        ("[1]", "host 0: 1, expected an object with 'ssh'"),
        ('[{"ssh": "a", "ips": "b"}]', "host 0: ips 'b', expected a list of addresses"),
        ('[{"ssh": "a;reboot"}]', "host 0: host: 'a;reboot', expected a name"),
        ('{"hosts": {}}', "expected a list of hosts"),
        ('{"hosts": [{"ssh": "a"}], "envs": ["A B=1"]}', "envs: 'A B=1', expected NAME=VALUE"),
        ("[", "not JSON"),
    ],
)
def test_a_wrong_host_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(LaunchError, match="^[^\n]*$") as error:
        read_hostfile(path)
    assert told in str(error.value)


def test_a_missing_host_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="none: No such file"):
        read_hostfile(tmp_path / "none")


@given(st.text(max_size=12))
def test_no_host_is_more_than_a_name(text: str) -> None:
    """Whatever is accepted means the same to a shell, and is no option of ssh."""
    try:
        host = Host(text)
    except LaunchError:
        return
    assert shlex.quote(host.address) == host.address and not host.ssh.startswith("-")


def test_command_lines_with_hosts() -> None:
    """The launcher's own messages leave from here, where the interface of the hosts may not be."""
    given = {"hosts": parse_hosts("a:2,me@b").hosts, "home": "10.0.0.9", "interface": "en5"}
    shown = " ".join(mpiexec.build_command(Mpiexec("m", "MPICH"), 3, ["prog"], **given))
    assert " -launcher ssh -hosts a:2,me@b:1 -wdir / -localhost 10.0.0.9 -n 3 " in shown and "en5" not in shown
    line = mpiexec.build_command(Mpiexec("m", "Open MPI"), 3, ["prog"], variables=["B", "A"], root=False, **given)
    shown = " ".join(line)
    assert f" --host a:2,me@b:1 --prefix {sys.prefix} --wdir / -x A -x B --mca btl_tcp_if_include en5 -n 3 " in shown
    assert shown.count("en5") == 1


@pytest.mark.parametrize(
    "given, interface, built",
    [
        ({}, None, {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}),
        ({"FI_PROVIDER": "verbs"}, None, {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "verbs"}),
        (
            {"FI_TCP_IFACE": "en1"},
            "en5",
            {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "en5"},
        ),
        (
            {"MPIR_CVAR_CH4_NETMOD": "ucx"},
            "en5",
            {"MPIR_CVAR_CH4_NETMOD": "ucx", "UCX_NET_DEVICES": "en5"},
        ),
    ],
)
def test_mpich_talks_over_tcp_unless_the_user_chose_otherwise(
    given: dict[str, str], interface: str | None, built: dict[str, str]
) -> None:
    found = mpiexec.build_environment(remote=True, interface=interface, base=given)
    assert {name: found[name] for name in found if name.startswith(("MPIR_", "FI_", "UCX_"))} == built


def test_the_way_home_is_never_a_hosts_own_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.home_address(parse_hosts("127.0.0.1,127.0.0.2").hosts).startswith("127.")
    ways = {"10.0.0.1": "10.0.0.9", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(preflight, "own_address_towards", ways.get)
    monkeypatch.setattr(preflight, "is_here", lambda address: address == "127.0.0.1")
    assert preflight.home_address(parse_hosts("127.0.0.1,me@10.0.0.1").hosts) == "10.0.0.9"
    with pytest.raises(
        LaunchError, match="^hosts mac0, mac1: the address .* cannot be found; give their addresses, or"
    ):
        preflight.home_address(parse_hosts("mac0,127.0.0.1,me@mac1").hosts)


@pytest.mark.parametrize(
    "said, remedy",
    [
        ("ssh: connect to host mac1 port 22: Connection refused", "check that its sshd runs"),
        ("ssh: connect to host mac1 port 22: No route to host", "check that it is on, and on this network"),
        ("ssh: connect to host mac1 port 22: Operation timed out", "check that it is on, and on this network"),
        ("me@mac1: Permission denied (publickey,password).", "'ssh me@mac1' must work without a password"),
        ("No key is known\nHost key verification failed.", "run 'ssh me@mac1' once"),
        ("Connection closed by mac1", "run 'ssh me@mac1 true' and read its message"),
    ],
)
def test_each_trouble_with_ssh_has_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, remedy: str
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\necho {shlex.quote(said)} >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    [trouble] = preflight.find_troubles(parse_hosts("me@mac1").hosts, Mpiexec("/no/mpiexec", "MPICH"))
    assert trouble.what == said.splitlines()[-1] and trouble.remedy.startswith(remedy)
    assert str(trouble) == f"host me@mac1: {trouble.what}; {trouble.remedy}"


@pytest.mark.parametrize("flavour, helper", [("MPICH", "hydra_pmi_proxy"), ("Open MPI", "prted")])
def test_what_a_host_lacks_has_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: mpiexec.Flavour, helper: str
) -> None:
    """Another machine, which lacks what is in one folder of this one."""
    here = tmp_path / "here"
    (here / "bin").mkdir(parents=True)
    (here / "bin" / helper).touch()
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho hello\nmv {here} {here}.away\nshift $(($# - 1))\neval "$1"\nmv {here}.away {here}\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hosts, mpi = parse_hosts("mac1").hosts, Mpiexec(str(here / "bin" / "mpiexec"), flavour)
    told = f"host mac1: no {flavour} at {here / 'bin' / helper}; install it at the same path as here"
    with pytest.raises(LaunchError, match=f"^{re.escape(told)}$"):
        preflight.check_hosts(hosts, mpi)
    (here / "bin" / helper).unlink()  # kept elsewhere: nothing is known of it
    preflight.check_hosts(hosts, mpi, "lo" if sys.platform == "linux" else "lo0")
    with pytest.raises(LaunchError, match=r"^host mac1: no network interface 'no5'; give the --interface that"):
        preflight.check_hosts(hosts, mpi, "no5")
    monkeypatch.setattr(preflight, "_WRAPPER", str(here / "bin"))
    with pytest.raises(LaunchError, match="^host mac1: no ringattn at "):
        preflight.check_hosts(hosts, mpi)


# Across hosts

RING = """
import os, sys
import mlx.core as mx
import ringattn as ra
with ra.init() as ring:
    total = ring.all_reduce(mx.array([ring.rank + 1.0]))
    told = (ring.rank, ring.hosts[ring.rank], total.item(), os.environ["RINGATTN_THREADS"], sys.argv[1:])
    sys.stdout.write(" ".join(map(str, told)) + "\\n")  # in one piece: without the launcher, ranks' pieces mix
"""
WAIT = "import os, time, pathlib\npathlib.Path(os.environ['NOTES'], str(os.getpid())).touch()\ntime.sleep(100)\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2) as one:
        yield one


def line(cluster: Cluster, *arguments: str) -> list[str]:
    hosts = [] if "--hosts" in arguments or "--hostfile" in arguments else ["--hosts", ",".join(cluster.addresses)]
    return [sys.executable, "-m", "ringattn.cli", "launch", *hosts, "--env", f"PYTHONPATH={ROOT}", *arguments]


def launch(cluster: Cluster, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    return cluster.run(line(cluster, *arguments), capture_output=True, text=True, timeout=90, cwd=ROOT, **options)


@pytest.fixture
def running(cluster: Cluster, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A launch whose ranks wait on both hosts."""
    program = tmp_path / "wait.py"
    program.write_text(WAIT)
    notes = tmp_path / "notes"
    notes.mkdir()
    command = line(cluster, "--env", f"NOTES={notes}", "--timeout", "5", str(program))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=cluster.environment, text=True, cwd=ROOT, **pipes) as process:
        end = time.monotonic() + 30
        while len(list(notes.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.pids = [int(note.name) for note in notes.iterdir()]  # type: ignore[attr-defined]
        assert len(process.pids) == 2  # type: ignore[attr-defined]
        yield process
        process.kill()


def gone(cluster: Cluster, seconds: float) -> bool:
    """Whether nothing is left on any host, within so many seconds."""
    end = time.monotonic() + seconds
    while cluster.processes() and time.monotonic() < end:
        time.sleep(0.1)
    return not cluster.processes()


@pytest.mark.hosts
def test_a_ring_over_two_hosts(cluster: Cluster, tmp_path: Path) -> None:
    """Each rank on its host, in order, with what was given to it, and its lines with its number before them."""
    program = tmp_path / "ring.py"
    program.write_text(RING)
    hostile = ["a b", "q'\"", "", ":", "$(touch /tmp/x)", ";", "*", "é"]
    slots = ",".join(f"{address}:2" for address in cluster.addresses)
    shown = launch(cluster, "--hosts", slots, "--env", "X=$(touch y) ' \" ;", str(program), *hostile)
    cores = len(os.sched_getaffinity(0))
    expected = [f"[{r}] {r} mac{r // 2} 10.0 {max(1, cores // 2)} {hostile}" for r in range(4)]
    assert sorted(shown.stdout.splitlines()) == expected, shown.stderr
    assert shown.returncode == 0 and gone(cluster, 3)


@pytest.mark.hosts
def test_environment_arrives_as_it_is(cluster: Cluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    entries = ", ".join(f'{{"ssh": "{address}"}}' for address in cluster.addresses)
    hosts.write_text(f'{{"backend": "ring", "envs": ["X=$(touch y) ;"], "hosts": [{entries}]}}')
    told = ["--hostfile", str(hosts), "--env", "Y=a'b", "--no-prefix", "sh", "-c", 'echo "$X|$Y|$(pwd)"']
    shown = launch(cluster, *told)
    assert shown.stdout == f"$(touch y) ;|a'b|{ROOT}\n" * 2, shown.stderr


@pytest.mark.hosts
def test_the_code_of_a_rank_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "fail.py"
    program.write_text("import os, sys, time\nif os.uname().nodename == 'mac1': sys.exit(7)\ntime.sleep(100)\n")
    shown = launch(cluster, str(program))
    assert shown.returncode == 7, shown.stderr
    assert "rank 1 (mac1) exited with code 7; ending the ranks still running: 0 (mac0)" in shown.stderr
    assert gone(cluster, 5)


@pytest.mark.hosts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_hosts(cluster: Cluster, running: subprocess.Popen, number: signal.Signals) -> None:
    running.send_signal(number)
    assert running.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    assert gone(cluster, 8)


@pytest.mark.hosts
def test_a_rank_killed_elsewhere(cluster: Cluster, running: subprocess.Popen) -> None:
    os.kill(running.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
    _, err = running.communicate(timeout=20)
    assert running.returncode == 137 and " was killed by SIGKILL" in err, err
    assert gone(cluster, 5)


@pytest.mark.hosts
@pytest.mark.parametrize("said", [False, True], ids=["silent", "with something on its way"])
def test_a_cable_pulled(cluster: Cluster, running: subprocess.Popen, said: bool) -> None:
    """The launcher ends what it can reach, and the other host what is there, within the timeout and 5 s."""
    cluster.unplug(1)
    begin = time.monotonic()
    for pid in running.pids if said else ():  # type: ignore[attr-defined]
        for number in (signal.SIGSTOP, signal.SIGCONT):  # which the wrapper tells the launcher
            os.kill(pid, number)
            time.sleep(0.1)
    _, err = running.communicate(timeout=30)
    # Open MPI's mpiexec may notice before the launcher does.
    told = ("(mac1): the connection to it was lost", "ranks that had not ended: 1 (mac1)")
    assert running.returncode != 0 and any(one in err for one in told), err
    limit = under_load(10)  # 5 s, the timeout, and 5
    assert time.monotonic() - begin < limit
    assert gone(cluster, limit - (time.monotonic() - begin)), [start_time(pid) for pid in running.pids]  # type: ignore
    cluster.plug(1)


@pytest.mark.hosts
@pytest.mark.parametrize(
    "hosts, told",
    [
        (
            "nowhere.invalid",
            "host nowhere.invalid: ssh: Could not resolve hostname nowhere.invalid: Name or service not known; check",
        ),
        ("a;b", "--hosts: host: 'a;b', expected a name"),
    ],
)
def test_a_host_out_of_reach_is_one_line(cluster: Cluster, hosts: str, told: str) -> None:
    shown = launch(cluster, "--hosts", hosts, "true")
    assert shown.returncode == 1 and told in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


@pytest.mark.hosts
def test_an_interface_that_a_host_has_not_is_one_line(cluster: Cluster) -> None:
    """Nothing starts. `lo` is not on the way, but is there; this machine has no `eth0` that leads to the hosts."""
    shown = launch(cluster, "--interface", "en9", "true")
    told = "; ".join(
        f"host {address}: no network interface 'en9'; give the --interface" for address in cluster.addresses
    )
    assert shown.returncode == 1 and shown.stderr.count("\n") == 1, shown.stderr
    assert all(part in shown.stderr for part in told.split("; ")), shown.stderr
    shown = launch(cluster, "--interface", "eth0", "--no-prefix", "sh", "-c", "echo $FI_TCP_IFACE")
    assert (shown.returncode, shown.stdout) == (0, "eth0\n" * 2), shown.stderr


@pytest.mark.hosts
def test_a_long_input_crosses_the_link_to_rank_0(cluster: Cluster, tmp_path: Path) -> None:
    """To a program that reads late, on another machine than the launcher's."""
    book = tmp_path / "book.txt"
    book.write_bytes(b"".join(b"%d\n" % number for number in range(1_000_000)))
    read = "sleep 2; sha256sum; cat /proc/sys/kernel/hostname"
    with book.open("rb") as file:
        shown = launch(cluster, "--no-prefix", "sh", "-c", read, stdin=file)
    digests = [hashlib.sha256(data).hexdigest() + "  -" for data in (book.read_bytes(), b"")]
    assert shown.returncode == 0, shown.stderr
    assert sorted(shown.stdout.splitlines()) == sorted([*digests, "mac0", "mac1"])


@pytest.mark.hosts
def test_ranks_talk_over_tcp(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "ring.py"
    program.write_text(RING)
    assert not {"MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER"} & cluster.environment.keys()
    shown = launch(cluster, "--env", "MPIR_CVAR_DEBUG_SUMMARY=1", str(program))
    assert shown.returncode == 0, shown.stderr
    if find_mpiexec().flavour == "MPICH":
        assert "libfabric provider: tcp" in shown.stdout, shown.stdout


@pytest.mark.hosts
def test_dry_run_prints_a_line_that_runs(cluster: Cluster, tmp_path: Path) -> None:
    """Of mpiexec alone, with nobody to report to."""
    program = tmp_path / "ring.py"
    program.write_text(RING)
    printed = launch(cluster, "--dry-run", str(program), "a b", ":")
    done = cluster.run(["sh", "-c", printed.stdout], capture_output=True, text=True, timeout=90, cwd=tmp_path)
    cores = len(os.sched_getaffinity(0))
    expected = [f"{r} mac{r} 3.0 {cores} ['a b', ':']" for r in range(2)]
    assert sorted(done.stdout.splitlines()) == expected and done.returncode == 0, done.stderr


def test_dry_run_shows_the_whole_line() -> None:
    given = ["--hosts", "127.0.0.1,127.0.0.2", "--interface", "en5", "--timeout", "9", "--dry-run", "prog", "x y"]
    shown = CliRunner().invoke(main, ["launch", *given])
    assert shown.exit_code == 0 and shown.stdout.startswith("env "), shown.stderr
    for part in ("RINGATTN_TIMEOUT=9", "127.0.0.1:1,127.0.0.2:1", "en5", "prog 'x y'"):
        assert part in shown.stdout


@pytest.mark.parametrize(
    "given, code, told",
    [
        (["-n", "2", "--interface", "en5"], 2, "Error: --interface: 'en5' without hosts, expected --hosts or --host"),
        (["--hosts", "a", "--interface", "-a"], 2, "'--interface': '-a', expected the name of a network interface"),
        (["--hosts", "nowhere.invalid", "--dry-run"], 1, "Error: hosts nowhere.invalid: the address at which they"),
    ],
)
def test_wrong_options_are_one_line(given: list[str], code: int, told: str) -> None:
    shown = CliRunner().invoke(main, ["launch", *given, "true"])
    assert shown.exit_code == code and told in shown.stderr and shown.stderr.count("\n") == 1


@pytest.mark.parametrize("backend, warned", [("ring", True), ("jaccl", True), ("mpi", False), ("any", False)])
def test_a_host_file_for_another_transport(tmp_path: Path, backend: str, warned: bool) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(f'{{"backend": "{backend}", "hosts": [{{"ssh": "127.0.0.1"}}]}}')
    shown = CliRunner().invoke(main, ["launch", "--hostfile", str(path), "--dry-run", "prog"])
    told = f"Warning: {path}: backend '{backend}' is for mlx.launch; here ranks talk over MPI\n"
    assert (shown.exit_code, shown.stderr) == (0, told if warned else "")

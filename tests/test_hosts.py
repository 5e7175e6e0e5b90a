"""Hosts: how they are named, and `ringattn launch` across several of them (the virtual cluster's)."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spawn import MPIEXEC, ROOT

from launch.virtual import Cluster, unavailable
from ringattn.cluster import mpiexec
from ringattn.cluster.hosts import Host, parse_hosts, read_hostfile
from ringattn.cluster.mpiexec import LaunchError, Mpiexec
from ringattn.cluster.rank import start_time

needs_hosts = pytest.mark.skipif(
    unavailable() is not None or MPIEXEC is None, reason=f"{unavailable() or 'there is no mpiexec'}"
)

# Names


def test_hosts_and_slots() -> None:
    assert parse_hosts("a, me@b:3,10.0.0.1").hosts == (Host("a"), Host("me@b", 3), Host("10.0.0.1"))
    assert parse_hosts("fe80::1").hosts == (Host("fe80::1"),)
    assert parse_hosts("a:2,b").slots == 3


@pytest.mark.parametrize(
    "text, hosts, variables",
    [
        ("# ring\na\nb:2  # two\n\n", (Host("a"), Host("b", 2)), ()),
        ("a slots=2 max_slots=4\nb slots=1\n", (Host("a", 2), Host("b")), ()),
        ('[{"ssh": "me@a", "ips": ["10.0.0.1"]}, {"ssh": "b", "rdma": [null]}]', (Host("me@10.0.0.1"), Host("b")), ()),
        (
            '{"backend": "ring", "envs": ["A=1 $(b)"], "hosts": [{"ssh": "a", "ips": []}]}',
            (Host("a"),),
            ("A=1 $(b)",),
        ),
    ],
)
def test_host_files(tmp_path: Path, text: str, hosts: tuple[Host, ...], variables: tuple[str, ...]) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    found = read_hostfile(path)
    assert (found.hosts, found.variables) == (hosts, variables)


@pytest.mark.parametrize(
    "text, told",
    [
        ("a b\n", "hosts, line 1: 'b', expected slots=N"),
        ("\na:x\n", "hosts, line 2: 'a:x', expected HOST or HOST:SLOTS"),
        ("a:0", "host a: 0 slots, expected a number above 0"),
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
    hosts = parse_hosts("a:2,me@b").hosts
    line = mpiexec.build_command(Mpiexec("m", "MPICH"), 3, ["prog"], hosts=hosts, interface="en5")
    shown = " ".join(line)
    assert " -localhost 10.0.0.9 -n 3 " in " ".join(
        mpiexec.build_command(Mpiexec("m", "MPICH"), 3, ["prog"], hosts=hosts, home="10.0.0.9")
    )
    assert " -launcher ssh -hosts a:2,me@b:1 -wdir / -iface en5 -n 3 " in shown
    line = mpiexec.build_command(
        Mpiexec("m", "Open MPI"), 3, ["prog"], hosts=hosts, interface="en5", variables=["B", "A"], root=False
    )
    shown = " ".join(line)
    assert f" --host a:2,me@b:1 --prefix {sys.prefix} --wdir / -x A -x B " in shown
    assert " --mca btl_tcp_if_include en5 --mca oob_tcp_if_include en5 -n 3 " in shown


# Across hosts

RING = """
import os, sys
import mlx.core as mx
import ringattn as ra
with ra.init() as ring:
    total = ring.all_reduce(mx.array([ring.rank + 1.0]))
    print(ring.rank, ring.hosts[ring.rank], total.item(), os.environ["RINGATTN_THREADS"], sys.argv[1:], flush=True)
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


@needs_hosts
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


@needs_hosts
def test_environment_arrives_as_it_is(cluster: Cluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    entries = ", ".join(f'{{"ssh": "{address}"}}' for address in cluster.addresses)
    hosts.write_text(f'{{"backend": "ring", "envs": ["X=$(touch y) ;"], "hosts": [{entries}]}}')
    told = ["--hostfile", str(hosts), "--env", "Y=a'b", "--no-prefix", "sh", "-c", 'echo "$X|$Y|$(pwd)"']
    shown = launch(cluster, *told)
    assert shown.stdout == f"$(touch y) ;|a'b|{ROOT}\n" * 2, shown.stderr


@needs_hosts
def test_the_code_of_a_rank_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "fail.py"
    program.write_text("import os, sys, time\nif os.uname().nodename == 'mac1': sys.exit(7)\ntime.sleep(100)\n")
    shown = launch(cluster, str(program))
    assert shown.returncode == 7, shown.stderr
    assert "rank 1 (mac1) exited with code 7; ending the ranks still running: 0 (mac0)" in shown.stderr
    assert gone(cluster, 5)


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_hosts(cluster: Cluster, running: subprocess.Popen, number: signal.Signals) -> None:
    running.send_signal(number)
    assert running.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    assert gone(cluster, 8)


@needs_hosts
def test_a_rank_killed_elsewhere(cluster: Cluster, running: subprocess.Popen) -> None:
    os.kill(running.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
    _, err = running.communicate(timeout=20)
    assert running.returncode == 137 and " was killed by SIGKILL" in err, err
    assert gone(cluster, 5)


@needs_hosts
def test_a_cable_pulled(cluster: Cluster, running: subprocess.Popen) -> None:
    """The launcher ends what it can reach, and the other host what is there, within the timeout and 5 s."""
    cluster.unplug(1)
    begin = time.monotonic()
    _, err = running.communicate(timeout=30)
    # Open MPI's mpiexec may notice before the launcher does.
    told = ("(mac1): the connection to it was lost", "ranks that had not ended: 1 (mac1)")
    assert running.returncode != 0 and any(one in err for one in told), err
    assert time.monotonic() - begin < 10  # 5 s, the timeout, and 5
    assert gone(cluster, 10 - (time.monotonic() - begin)), [start_time(pid) for pid in running.pids]  # type: ignore
    cluster.plug(1)


@needs_hosts
@pytest.mark.parametrize(
    "hosts, told",
    [
        ("nowhere.invalid", "host nowhere.invalid: ssh: Could not resolve hostname nowhere.invalid"),
        ("a;b", "--hosts: host: 'a;b', expected a name"),
    ],
)
def test_a_host_out_of_reach_is_one_line(cluster: Cluster, hosts: str, told: str) -> None:
    shown = launch(cluster, "--hosts", hosts, "true")
    assert shown.returncode == 1 and told in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


@needs_hosts
def test_what_a_host_lacks_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringattn.cluster import reach

    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.setattr(reach, "_NEEDED", {"/no/python": "Python"})
    with pytest.raises(LaunchError, match=r"^host .*: no Python at /no/python; install it at the same path as here$"):
        reach.check_hosts(parse_hosts(cluster.addresses[0]).hosts)


def test_dry_run_shows_the_whole_line() -> None:
    shown = subprocess.run(
        [*line(None, "--hosts", "a,b", "--interface", "en5", "--timeout", "9", "--dry-run", "prog", "x y")],  # type: ignore
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert shown.returncode == 0 and shown.stdout.startswith("env "), shown.stderr
    for part in ("FI_TCP_IFACE=en5", "RINGATTN_TIMEOUT=9", "a:1,b:1", " en5 ", "prog 'x y'"):
        assert part in shown.stdout

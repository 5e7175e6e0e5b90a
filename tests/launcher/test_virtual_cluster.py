"""The virtual cluster that stands in for several machines."""

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
from spawn import MPIEXEC, ROOT

from launch.virtual import Cluster, clean
from launch.virtual.cluster import STATE

pytestmark = pytest.mark.hosts
PYTHON = shlex.quote(sys.executable)
TCP = ["-genv", "MPIR_CVAR_CH4_NETMOD", "ofi", "-genv", "FI_PROVIDER", "tcp"]  # what ringattn launch tells MPICH
TRANSFER = """
import socket, sys, threading, time
here, there = sys.argv[1:]
listening = socket.create_server((here, 9999))
def take():
    one, got = listening.accept()[0], 0
    begin = time.monotonic()
    while part := one.recv(1 << 20):
        got += len(part)
    print(got * 8e-6 / (time.monotonic() - begin))
taking = threading.Thread(target=take)
taking.start()
for _ in range(100):
    try:
        other = socket.create_connection((there, 9999), timeout=5)
        break
    except OSError:
        time.sleep(0.1)
other.sendall(bytes(12_500_000))
other.close()
taking.join()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2, rate="200mbit", memory="300M") as one:
        yield one


def ssh(cluster: Cluster, host: int, *command: str, **options: object) -> subprocess.CompletedProcess:
    return cluster.run(["ssh", "-x", cluster.addresses[host], *command], capture_output=True, text=True, **options)


def test_hosts_have_names_and_reach_each_other(cluster: Cluster) -> None:
    shown = ssh(cluster, 1, PYTHON, "-c", shlex.quote("import socket; print(socket.gethostname())"))
    assert shown.stdout == "mac1\n"
    assert cluster.addresses[0] in ssh(cluster, 1, "getent", "hosts", "mac0").stdout


def test_both_ways_of_a_link_have_the_rate_at_once(cluster: Cluster) -> None:
    a, b = cluster.addresses
    command = [f"{PYTHON} -c {shlex.quote(TRANSFER)} {here} {there}" for here, there in ((a, b), (b, a))]
    both = [
        subprocess.Popen(["ssh", host, line], env=cluster.environment, stdout=subprocess.PIPE, text=True)
        for host, line in zip((a, b), command)
    ]
    rates = [float(one.communicate(timeout=60)[0]) for one in both]
    assert all(140 < rate < 215 for rate in rates), rates  # Mbit/s
    assert cluster.sent(0) > 12_500_000


def test_memory_ends_where_the_host_ends(cluster: Cluster) -> None:
    for size, codes in ((100, (0,)), (500, (137, -signal.SIGKILL))):
        shown = ssh(cluster, 0, PYTHON, "-c", shlex.quote(f"b'x' * ({size} << 20)"))
        assert shown.returncode in codes


def test_ranks_know_the_memory_of_their_host(cluster: Cluster) -> None:
    """A prompt that does not fit there is refused before it is read."""
    code = "from ringattn import init; from ringattn.lm.host_memory import memory_of_rank as m; print(m(init('solo')))"
    shown = ssh(cluster, 0, PYTHON, "-c", shlex.quote(code))
    assert shown.stdout == f"{300 << 20}\n", shown.stderr


def test_ssh_is_like_ssh(cluster: Cluster) -> None:
    assert ssh(cluster, 0, "echo $((1 + 2)); exit 7").stdout == "3\n"
    assert ssh(cluster, 0, "exit 7").returncode == 7
    assert ssh(cluster, 0, "echo", shlex.quote("a  $HOME 'b'")).stdout == "a  $HOME 'b'\n"
    os.environ["LEAK"] = "1"
    names = {line.partition("=")[0] for line in ssh(cluster, 0, "env").stdout.splitlines()}
    del os.environ["LEAK"]
    assert "LEAK" not in names and {"HOME", "PATH", "SSH_CONNECTION"} <= names
    unknown = cluster.run(["ssh", "-o", "BatchMode=yes", "nobody@mac9", "true"], capture_output=True, text=True)
    assert unknown.returncode == 255 and "Could not resolve hostname mac9" in unknown.stderr


def test_a_cable_can_be_taken_out(cluster: Cluster) -> None:
    probe = ["ping", "-c", "1", "-W", "1", cluster.addresses[1]] if Path("/bin/ping").exists() else None
    cluster.unplug(1)
    assert ssh(cluster, 1, "true").returncode == 255
    cluster.plug(1)
    assert ssh(cluster, 1, "true").returncode == 0
    assert probe is None or cluster.run(probe, capture_output=True).returncode == 0


def test_a_ring_over_the_link(cluster: Cluster) -> None:
    """The real mpiexec, one rank a host, and blocks that cross the cable."""
    program = (
        "import ringattn as ra, mlx.core as mx\n"
        "with ra.init() as ring:\n"
        "    x = ring.broadcast(mx.ones((500_000,)))\n"
        "    print(f'{ring.rank} {ring.hosts} {x.sum().item()}\\n', end='', flush=True)\n"
    )
    line = [MPIEXEC, "-launcher", "ssh", "-iface", cluster.bridge, "-hosts", ",".join(cluster.addresses), "-ppn", "1"]
    before = cluster.sent(0)
    shown = cluster.run(
        [*line, *TCP, "-n", "2", "-genv", "PYTHONPATH", str(ROOT), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert sorted(shown.stdout.splitlines()) == [f"{r} ('mac0', 'mac1') 500000.0" for r in (0, 1)], shown.stderr
    assert cluster.sent(0) - before > 2_000_000 and cluster.processes() == []


def test_blocks_travel_both_ways_over_cables_of_their_own() -> None:
    """Half of every block leaves over either cable, and next to nothing over the bridge."""
    program = (
        "import ringattn as ra, mlx.core as mx\n"
        "with ra.init() as ring:\n"
        "    layout = ra.Layout.zigzag(3 * 1024, 3)\n"
        "    x = mx.random.normal((1, 2, 1024, 64), key=mx.random.key(ring.rank))\n"
        "    mx.eval(ra.ring_attention(x, x, x, ring=ring, layout=layout, strategy='pass_kv'))\n"
        "    ring.barrier()\n"
    )
    with Cluster(3, ring=True, rate="200mbit") as cables:
        hosts = ",".join(cables.addresses)
        line = [MPIEXEC, "-launcher", "ssh", "-iface", cables.bridge, "-hosts", hosts, "-ppn", "1", "-n", "3"]
        line += [*TCP, "-genv", "PYTHONPATH", str(ROOT), sys.executable, "-c", program]
        done = cables.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        told = ssh(cables, 1, "cat /sys/class/net/left/statistics/tx_bytes /sys/class/net/right/statistics/tx_bytes")
        sent = [int(line) for line in told.stdout.split()]
        block = 1024 * 2 * 64 * 2 * 4
        assert all(block < count < 1.3 * block for count in sent), sent  # two hops of half a block
        assert cables.sent(1) < 0.3 * block


def test_nothing_is_left(tmp_path: Path) -> None:
    """After an exception, after the end of the command, and after the maker was killed."""

    def left() -> str:
        shown = subprocess.run("ip -o link; ip netns; ls /etc/netns", shell=True, capture_output=True, text=True)
        return shown.stdout

    with pytest.raises(RuntimeError), Cluster(1) as one:
        subprocess.Popen(["ssh", one.addresses[0], "sleep 100"], env=one.environment)
        raise RuntimeError
    assert one.bridge not in left() and not (STATE / one.bridge).exists()
    line = [sys.executable, "-m", "launch.virtual", "--hosts", "1", "--"]
    shown = subprocess.run(
        [*line, "sh", "-c", "echo $RINGATTN_BRIDGE; exit 3"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 3 and shown.stdout.strip() and shown.stdout.strip() not in left()
    waiting = "echo $RINGATTN_BRIDGE; ssh $RINGATTN_HOSTS sleep 1000"
    with subprocess.Popen([*line, "sh", "-c", waiting], cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        name = maker.stdout.readline().strip()
        maker.kill()
    assert name in left()
    time.sleep(0.2)
    clean()
    assert name not in left()


@pytest.mark.parametrize(
    "options, told",
    [
        (["--hosts", "0", "--", "true"], "hosts: 0, expected 1 to 200"),
        (["--memory", "much", "--", "true"], "memory: 'much', expected"),
        (["--rate", "fast", "--", "true"], "fast"),
        (["--hosts", "1"], "COMMAND: not given"),
        (["--hosts", "1", "--", "no-such-program"], "COMMAND: no-such-program: not found"),
    ],
)
def test_wrong_input_is_one_line(options: list[str], told: str) -> None:
    line = [sys.executable, "-m", "launch.virtual", *options]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and told in shown.stderr.splitlines()[-1] and "Traceback" not in shown.stderr


def test_an_end_by_signal_takes_all_down() -> None:
    line = [
        sys.executable,
        "-m",
        "launch.virtual",
        "--hosts",
        "1",
        "--",
        "sh",
        "-c",
        "echo $RINGATTN_BRIDGE; sleep 100",
    ]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        name = maker.stdout.readline().strip()
        maker.send_signal(signal.SIGTERM)
        maker.wait(10)
    assert not (STATE / name).exists()

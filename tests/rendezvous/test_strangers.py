"""The ports that ringattn listens at: of the launcher, of the doctor, and of ranks over mx.distributed.

Whatever strangers do there, the true ones get in at once; and whatever a true one says, it is at most an error.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spawn import ROOT

from launch.virtual import Cluster
from ringattn.doctor import connectivity, runner
from ringattn.errors import RingError
from ringattn.launcher import mpiexec, rank_wrapper
from ringattn.launcher.hostfile import parse_hosts
from ringattn.launcher.processes import start_time
from ringattn.launcher.rank_table import RankTable
from ringattn.rendezvous.channel import Channel
from ringattn.rendezvous.client import connect, parse_endpoint
from ringattn.rendezvous.handshake import RESPONSE
from ringattn.transport.failures.status_file import Status
from ringattn.transport.mlx.bootstrap import TcpBootstrap

HERE = "127.0.0.1"
SOON = 3.0  # s; it was 5 for each stranger, and 77 for one that sends a byte now and then
BOMB = b"[" * 60_000 + b"\n"

Port = tuple[tuple[str, int], Callable[[], float]]  # where; lets the true ones in, and tells in how many seconds


def seconds(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


@contextmanager
def launcher_port() -> Iterator[Port]:
    ranks = RankTable([HERE])
    addresses, key = parse_endpoint(ranks.endpoint)

    def enter() -> None:
        with connect(addresses, key, 1) as link:
            Channel(link).send(hello())
            while "1" not in ranks:
                ranks.read()
        assert ranks["1"].host == "mac1"

    yield addresses[0], lambda: seconds(enter)
    ranks.close()


@contextmanager
def doctor_port() -> Iterator[Port]:
    coordinator = connectivity.Coordinator(HERE, 2)

    def take_part(rank: int) -> None:
        client = connectivity.CoordinatorClient(coordinator.endpoint, rank)
        assert client.gather([rank]) == [[0], [1]]
        client.close()

    def enter() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(take_part, range(2)))

    yield parse_endpoint(coordinator.endpoint)[0][0], lambda: seconds(enter)
    coordinator.close()


@contextmanager
def mesh_port() -> Iterator[Port]:
    bootstraps = [TcpBootstrap("mac", [HERE]) for _ in range(3)]
    endpoints = [bootstrap.endpoint for bootstrap in bootstraps]

    def enter() -> None:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: bootstraps[rank].connect_all(rank, endpoints), range(3)))
        for rank, links in enumerate(found):
            assert links.keys() == {0, 1, 2} - {rank}
            for link in links.values():
                link.close()

    yield (HERE, endpoints[0]["port"]), lambda: seconds(enter)


PORTS = {"launcher": launcher_port, "doctor": doctor_port, "mesh": mesh_port}
every_port = pytest.mark.parametrize("port", PORTS.values(), ids=PORTS)


def hello() -> dict:
    """What a wrapper says first, of processes that are dead."""
    return {"host": "mac1", "processes": [[2**22 + 1, "1"], [2**22 + 2, "1"]]}


# What strangers cost


@every_port
@pytest.mark.parametrize(
    "said",
    [b"", b"\0", BOMB, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * RESPONSE.size],
    ids=["nothing", "a byte", "brackets", "a request", "a wrong proof"],
)
def test_a_stranger_delays_nobody(port, said: bytes) -> None:
    """Not one who came first and says nothing, or a part, or nonsense."""
    with port() as (address, enter), socket.create_connection(address) as stranger:
        with suppress(OSError):  # it is hung up on
            stranger.sendall(said)
        assert enter() < SOON


@every_port
def test_a_crowd_of_idle_strangers_delays_nobody(port) -> None:
    with port() as (address, enter), ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(address))
        assert enter() < SOON


@every_port
def test_an_endless_line_is_not_kept(port) -> None:
    with port() as (address, enter), socket.create_connection(address) as stranger:
        stranger.settimeout(20)
        sent = 0
        with suppress(ConnectionError):
            while sent < 100 << 20:
                sent += stranger.send(bytes(1 << 20))
        assert sent < 30 << 20  # what the system's own buffers take
        assert enter() < SOON


def test_a_mesh_endpoint_holds_no_secret() -> None:
    """A program that reads all endpoints, and has one of its own, is refused."""
    first, second, reader = (TcpBootstrap("mac", [HERE]) for _ in range(3))
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(first.connect_all, 0, [first.endpoint, second.endpoint])
        with pytest.raises(RingError, match="another machine or another run"):
            reader.connect_all(1, [first.endpoint, reader.endpoint])
        second.connect_all(1, [first.endpoint, second.endpoint])[0].close()
        connecting.result(10)[1].close()


STEPS = st.one_of(
    st.binary(max_size=80),
    st.binary(min_size=RESPONSE.size, max_size=RESPONSE.size),
    st.builds(RESPONSE.pack, st.integers(0, 3), *[st.binary(min_size=32, max_size=32)] * 2),
    st.sampled_from([b"", BOMB, b"\xff" * 5000, "close", "reset", "half"]),
)
STRANGERS = st.lists(st.lists(STEPS, max_size=4), min_size=1, max_size=6)
EXAMPLES = int(os.environ.get("RINGATTN_FUZZ", "25"))  # at each port
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def act(address: tuple[str, int], steps: list) -> socket.socket:
    """What one stranger does; its end, which may be open still."""
    link = socket.create_connection(address, timeout=10)
    with suppress(OSError):
        for step in steps:
            if step == "close":
                link.close()
            elif step == "half":
                link.shutdown(socket.SHUT_WR)
            elif step == "reset":
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.close()
            else:
                link.sendall(step)
    return link


@every_port
@fuzzed
@given(strangers=STRANGERS)
def test_whatever_strangers_do(port, strangers: list[list]) -> None:
    with port() as (address, enter):
        links = [act(address, steps) for steps in strangers]
        took = enter()
        for link in links:
            link.close()
    assert took < SOON


# What true ones may say

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["host", "processes", "stopped", "opening", "ended", "asked", "known", "said", "input", "computing"]
)
SAID = st.lists(
    st.one_of(
        st.dictionaries(NAMES, VALUES | st.lists(st.tuples(st.integers(), st.text(max_size=3)), max_size=3)),
        VALUES,
        st.binary(max_size=40),
        st.sampled_from([BOMB, b"\xff" * 9, struct.pack("!I", 60_000) + BOMB[:60_000]]),
    ),
    max_size=5,
)


def say(link: socket.socket, said: list) -> None:
    """Values as messages, bytes as they are."""
    with suppress(OSError):
        for one in said:
            text = one if isinstance(one, bytes) else json.dumps(one).encode()
            link.sendall(text if isinstance(one, bytes) else struct.pack("!I", len(text)) + text)


@fuzzed
@given(said=SAID, introduced=st.booleans())
def test_whatever_a_wrapper_says(said: list, introduced: bool) -> None:
    """The launcher goes on hearing, and may signal nobody else."""
    ranks = RankTable([HERE])
    addresses, key = parse_endpoint(ranks.endpoint)
    with connect(addresses, key, 0) as link:
        say(link, [hello(), *said] if introduced else said)
    end = time.monotonic() + 10
    ranks.read()
    while time.monotonic() < end and (ranks._pending or any(rank.connection.open for rank in ranks.values())):
        ranks.read()
    assert not ranks._pending and not any(rank.connection.open for rank in ranks.values())
    assert all(process.pid > 1 for rank in ranks.values() for process in rank.here)
    assert all(isinstance(rank.end.status, int) and str(rank.end.cause) for rank in ranks.values() if rank.end)
    ranks.close()


@pytest.mark.parametrize(
    "known", [{"call": 5}, {"hop": "x"}, {"rank": [0]}, {"broken": 1}, {"call": True, "hop": None}]
)
def test_a_status_of_other_types_is_ignored(known: dict) -> None:
    ranks = RankTable([HERE])
    addresses, key = parse_endpoint(ranks.endpoint)
    with connect(addresses, key, 0) as link:
        say(link, [hello(), {"ended": 3, "asked": False, "known": known}])
        end = time.monotonic() + 10
        while time.monotonic() < end and not any(rank.end for rank in ranks.values()):
            ranks.read()
    assert str(ranks["0"].end.cause) == "rank 0 (mac1) exited with code 3"
    ranks.close()


@pytest.mark.parametrize("pid", [-1, 0, 1, 2**31, 2.0, "2", None])
def test_no_other_number_than_a_pid_is_signalled(pid: object) -> None:
    """Some stand for groups, or for all processes of the user."""
    ranks = RankTable([HERE])
    addresses, key = parse_endpoint(ranks.endpoint)
    with connect(addresses, key, 0) as link:
        say(link, [{**hello(), "processes": [[pid, "1"], [2**22 + 1, "1"]]}])
        end = time.monotonic() + 10
        while not link_is_closed(link) and time.monotonic() < end:
            ranks.read()
        assert link_is_closed(link) and not ranks
    ranks.close()


def link_is_closed(link: socket.socket) -> bool:
    """Whether the other side has hung up; nothing else is expected of it."""
    link.setblocking(False)
    try:
        return link.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@fuzzed
@given(said=SAID)
def test_whatever_a_rank_says_to_the_doctor(said: list) -> None:
    """The other ranks hear that it has left, if it made no sense."""
    coordinator = connectivity.Coordinator(HERE, 2)
    addresses, key = parse_endpoint(coordinator.endpoint)
    client = connectivity.CoordinatorClient(coordinator.endpoint, 0)
    with connect(addresses, key, 1) as link:
        say(link, said)
        link.shutdown(socket.SHUT_WR)
        client._channel._link.settimeout(20)
        begin = time.monotonic()
        with suppress(RingError):
            assert client.gather(["x"])[0] == ["x"]
        assert time.monotonic() - begin < 15
    client.close()
    coordinator.close()


# The launcher itself


def start(*arguments: str, **changed: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "ringattn.cli", "launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changed}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ENDPOINT = """
import os, socket, sys, time
def endpoint(pid):
    variables = open(f"/proc/{pid}/environ").read().split("\\0")
    return dict(one.split("=", 1) for one in variables if "=" in one)["RINGATTN_LAUNCHER"]
place, key = endpoint(os.getppid()).split()
"""


@linux
@pytest.mark.ranks
def test_garbage_at_the_launcher_s_port_does_not_end_the_job(tmp_path: Path) -> None:
    program = tmp_path / "attack.py"
    program.write_text(
        ENDPOINT + "address, port = place.split(',')\n"
        "links = [socket.create_connection((address, int(port))) for _ in range(80)]\n"
        "for i, link in enumerate(links):\n"
        "    try: link.sendall((b'', b'[' * 60000 + b'\\n', bytes(68), b'{}')[i % 4])\n"
        "    except OSError: pass\n"
        "time.sleep(1)\n"
    )
    with start("-n", "2", str(program)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


SEARCH = ENDPOINT + (
    "time.sleep(0.5)\n"
    "def read(pid):\n"
    "    try: return open(f'/proc/{pid}/cmdline').read()\n"
    "    except OSError: return ''\n"
    "lines = [read(pid) for pid in os.listdir('/proc') if pid.isdigit()]\n"
    "assert any('rank_wrapper.py' in line for line in lines)\n"
    "assert 'RINGATTN_LAUNCHER' not in os.environ\n"
    "sys.stdout.write(f'{sum(key in line for line in lines)} of {len(key)}\\n')\n"
)


@linux
@pytest.mark.ranks
def test_no_command_line_shows_the_key(tmp_path: Path) -> None:
    program = tmp_path / "search.py"
    program.write_text(SEARCH)
    with start("-n", "2", str(program)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "0 of 64\n" * 2), err


@pytest.mark.hosts
def test_no_command_line_of_several_hosts_shows_the_key(tmp_path: Path) -> None:
    """Of mpiexec, of what it starts by ssh, and of what that starts: all are processes of this machine."""
    program = tmp_path / "search.py"
    program.write_text(SEARCH)
    with Cluster(2) as cluster:
        line = [sys.executable, "-m", "ringattn.cli", "launch", "--hosts", ",".join(cluster.addresses)]
        shown = cluster.run([*line, "--no-prefix", str(program)], capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert (shown.returncode, shown.stdout) == (0, "0 of 64\n" * 2), shown.stderr


def test_the_doctor_keeps_its_secrets_off_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own, and those of the host file's variables: they are in a file that no other user can open."""
    seen: dict = {}

    def look(line: list[str], seconds: float) -> tuple[int, str, str]:
        path = Path(line[line.index("--hostfile") + 1])
        seen.update(line=line, mode=path.parent.stat().st_mode & 0o777, file=json.loads(path.read_text()), path=path)
        return 0, "", ""

    monkeypatch.setattr(runner, "_run", look)
    monkeypatch.setattr(runner, "find_troubles", lambda *_: [])
    hosts = parse_hosts(f"{HERE}:2")
    target = runner.Target(2, type(hosts)(hosts.hosts, ("HF_TOKEN=hush",)), None, None)
    examination = runner._examine(target, mpiexec.Mpiexec("/x/mpiexec", "MPICH"), hosts.hosts, ["worker"], 5.0)
    token, endpoint = seen["file"]["envs"]
    assert token == "HF_TOKEN=hush" and endpoint.startswith(f"{connectivity.ENDPOINT}={HERE},")
    assert seen["file"]["hosts"] == [{"ssh": HERE, "slots": 2}] and seen["mode"] == 0o700
    assert not any(secret in " ".join(seen["line"]) for secret in ("hush", endpoint.split()[-1]))
    assert not seen["path"].exists() and examination.size == 2


# The wrapper of a rank, on a host where others have been busy in the shared temporary folder


def wrap(tmp_path: Path, folder: Path | str, command: list[str]) -> tuple[subprocess.CompletedProcess, RankTable]:
    """Run a wrapper as mpiexec does, with a launcher that lets go once the program has ended."""
    ranks = RankTable([HERE])
    changed = {"RINGATTN_LAUNCHER": ranks.endpoint, "RINGATTN_LAUNCH_DIR": str(folder), "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-IS", rank_wrapper.__file__, "--", *command]
    environment = {**os.environ, **changed}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < end:
            ranks.read()
            for one in ranks.values():
                if one.end:
                    one.connection.release()
            time.sleep(0.01)
        out, err = process.communicate(timeout=10)
    ranks.close()
    return subprocess.CompletedProcess(line, process.returncode, out, err), ranks


LOOK = 'stat -c "%a %h" "$RINGATTN_STATUS" "$(dirname $RINGATTN_STATUS)"; echo "$RINGATTN_STATUS"'


@linux
@pytest.mark.parametrize("kind", ["missing", "link", "of all", "private"])
def test_a_status_file_is_in_a_private_folder(tmp_path: Path, kind: str) -> None:
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    victim.mkdir(mode=0o700)
    folder = shared / "ringattn-of-the-launcher"
    if kind == "link":
        folder.symlink_to(victim)
    elif kind != "missing":
        folder.mkdir()
        folder.chmod(0o777 if kind == "of all" else 0o700)
    shown, ranks = wrap(shared, folder, ["sh", "-c", LOOK])
    file, inside, path = shown.stdout.splitlines()
    assert file == "600 1" and inside.startswith("700 ") and shown.stderr == ""
    assert (Path(path).parent == folder) is (kind == "private")
    assert ranks["0"].end.code == 0
    assert not Path(path).exists() and Path(path).parent.exists() is (kind == "private")
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_rank_writes_through_no_link(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, path = tmp_path / "victim", tmp_path / "status"
    victim.write_bytes(b"precious" * 100)
    path.symlink_to(victim) if kind == "symbolic" else path.hardlink_to(victim)
    monkeypatch.setenv("RINGATTN_STATUS", str(path))
    status = Status()
    status.opened(0, 1)
    status.broken(True)
    assert victim.read_bytes() == b"precious" * 100


@linux
def test_a_wrapper_that_cannot_make_out_the_launcher_ends(tmp_path: Path) -> None:
    """Another program listens there."""
    with socket.create_server((HERE, 0)) as other:
        endpoint = f"{HERE},{other.getsockname()[1]} {'0' * 64}"
        line = [sys.executable, "-IS", rank_wrapper.__file__, "--", "true"]
        environment = {**os.environ, "RINGATTN_LAUNCHER": endpoint}
        process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
        other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n")
        err = process.communicate(timeout=20)[1]
    host = os.uname().nodename
    assert process.returncode == 1
    assert err == f"ringattn: rank 0 ({host}) cannot reach the launcher: {HERE}: another program answers there\n"
    assert start_time(process.pid) is None

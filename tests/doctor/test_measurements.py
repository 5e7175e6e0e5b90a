"""Tests of what the ranks of the doctor report and measure: hosts, speeds, connections and links."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict

import pytest
from doctor_cases import FAST, MAC, MPICH

from ringattn.doctor import compute_speed, connectivity, host_info, link_speed, records
from ringattn.doctor.records import RankReport
from ringattn.doctor.runner import launcher_message
from ringattn.errors import RingError
from ringattn.rendezvous.handshake import make_key
from ringattn.transport.solo import SoloRing


class Clock:
    """Clock that advances only in `sleep`, in place of the module `time`."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def test_records_come_back_whatever_is_around_them(capfd):
    records.write_record(1, doing="timing", host=asdict(MAC))
    records.write_record(1, speeds=asdict(FAST), mpi=asdict(MPICH))
    records.write_record(0, link=asdict(link_speed.LinkSpeed((0, 1), 1e-5, 1.0, 2.0, 3.0)), hop=4.0, done=True)
    lines = capfd.readouterr().out.splitlines()
    noise = ["hello", f"[2] {records.MARK}" + '{"rank": 2, "cut o', ""]
    report = records.parse_records("\n".join([*noise, *(f"mac1: {line}" for line in lines)]))
    assert report.ranks == {0: RankReport(done=True), 1: RankReport(MAC, FAST, MPICH, doing="timing")}
    assert (report.links, report.hop) == ([link_speed.LinkSpeed((0, 1), 1e-5, 1.0, 2.0, 3.0)], 4.0)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Traceback\n  x\nringattn: rank 1 was killed\nringattn: more\n", "rank 1 was killed"),
        ("Warning: w\nError: a: no Python\nError: b: no ssh\n", "a: no Python; b: no ssh"),
        ("ssh: refused\n\n", "ssh: refused"),
        ("", ""),
    ],
)
def test_launcher_message(said, words):
    assert launcher_message(said) == words


# HostInfo and measurements


def test_facts_of_this_host():
    report = host_info.collect()
    assert report.python == sys.executable and report.cores >= 1 and report.memory > 1 << 28
    assert report.system and report.chip and json.loads(json.dumps(asdict(report))) == asdict(report)


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({}, "advice"),
        ({"RINGATTN_BLAS": "mlx"}, "unset RINGATTN_BLAS, so that"),
        ({"RINGATTN_BLAS": "numpy", "LD_PRELOAD": "libc.so"}, "advice"),
        ({"RINGATTN_BLAS": "mlx", "LD_PRELOAD": "/usr/lib/libopenblas.so.0"}, "unset RINGATTN_BLAS and LD_PRELOAD, so"),
    ],
)
def test_only_what_is_set_is_to_be_unset(monkeypatch, environment, advice):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(host_info.sgemm, "advice", lambda: "advice")
    for name in ("RINGATTN_BLAS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert host_info.collect().blas_advice.startswith(advice)


def test_fingerprint_changes_with_sources_alone(tmp_path):
    """C files do not count, since they are not installed."""
    (tmp_path / "a.py").write_text("1")
    one = host_info.fingerprint(tmp_path)
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "a.c").write_text("1")
    assert host_info.fingerprint(tmp_path) == one
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert host_info.fingerprint(tmp_path) != one


def test_fastest_stops_at_what_takes_long_enough(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compute_speed, "time", clock)
    monkeypatch.setattr(compute_speed, "ENOUGH", 0.02)
    tried = []

    def work(size: int):
        tried.append(size)
        return lambda: clock.sleep(size / 1000), 1e6 * size

    assert 1e8 < compute_speed.fastest(work, (1, 10, 30, 100)).flops <= 1e9
    assert tried == [1, 10, 30]


def test_a_disturbed_timing_does_not_count(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compute_speed, "time", clock)
    pauses = iter([0.05, 0.05, 0.05, 0.001])
    assert compute_speed.fastest(lambda size: (lambda: clock.sleep(next(pauses)), 1e6), (1,)).flops > 1e8


@pytest.mark.parametrize(
    ("seconds", "spread"), [((0.9, 0.3, 0.1, 0.2), 2.0), ((9.0, 0.1, 0.1, 0.1), 1.0), ((0.1, 0.4, 0.4, 0.4), 4.0)]
)
def test_the_spread_of_equal_measurements(monkeypatch, seconds, spread):
    """The first measurement does not count for the median, only for the best."""
    times = iter(seconds)
    monkeypatch.setattr(compute_speed, "_time", lambda call: next(times))
    found = compute_speed.fastest(lambda size: (lambda: None, 1e6), (1,))
    assert found == (pytest.approx(1e7), pytest.approx(spread))


def test_ways_between_hosts(monkeypatch):
    """Of three ranks on two hosts; then nobody answers at the address that others call."""
    hosts = ["127.0.0.1", "127.0.0.1", "127.0.0.2"]

    def find_all():
        with closing(connectivity.Coordinator("127.0.0.1", 3)) as coordinator, ThreadPoolExecutor(3) as pool:
            return list(
                pool.map(lambda rank: connectivity.find_failed_connections(coordinator.endpoint, rank, hosts), range(3))
            )

    assert find_all() == [[]] * 3
    monkeypatch.setattr(connectivity, "derive_key", lambda key, purpose: make_key())  # every rank is another machine
    told = find_all()
    assert [(way.caller, way.peer) for way in told[0]] == [(0, 2), (1, 2), (2, 0), (2, 1)] and told == [told[0]] * 3
    another = "another machine or another run of ringattn answers there"
    assert told[0][0].why == f"127.0.0.2: {another}, 127.0.0.1: {another}"


def test_each_rank_answers_with_a_key_of_its_own():
    key = make_key()
    with closing(connectivity.AnsweringListener(key, 1)) as listener:
        here = ("127.0.0.1", listener.port)
        assert connectivity._try([here], key, 0, 1) is None
        assert (
            connectivity._try([here], key, 0, 2)
            == "127.0.0.1: another machine or another run of ringattn answers there"
        )
        assert connectivity._try([("nowhere.invalid", listener.port), here], key, 0, 1) is None


def test_a_doctor_out_of_reach_is_named():
    with closing(connectivity.Coordinator("127.0.0.1", 1)) as coordinator:
        endpoint = coordinator.endpoint
    with pytest.raises(RingError, match=r"^no TCP connection to the doctor at 127.0.0.1: Connection refused$"):
        connectivity.CoordinatorClient(endpoint, 0)


def test_a_rank_that_leaves_is_told_to_the_others():
    with closing(connectivity.Coordinator("127.0.0.1", 2)) as coordinator:
        first, second = (connectivity.CoordinatorClient(coordinator.endpoint, rank) for rank in range(2))
        second.close()
        with closing(first), pytest.raises(RingError, match="^a rank left before all ranks had sent their results$"):
            first.gather(["x"])


def test_pairs():
    assert (
        link_speed.pairs(1) == []
        and link_speed.pairs(2) == [(0, 1)]
        and link_speed.pairs(3) == [(0, 1), (1, 2), (2, 0)]
    )


class SlowRing(SoloRing):
    """Ring of one rank that sends to itself, `rate` bytes per second by `clock`."""

    rate = 125e6  # 1 Gbit/s
    sent = 0
    clock: Clock

    def send(self, load, *, tag, after=(), step=1):
        self.sent += sum(map(len, load()))
        self.clock.sleep(sum(map(len, load())) / self.rate)

    def recv(self, buffers, *, tag, after=(), step=1):
        pass

    def wait(self, *transfers):
        pass


def test_bandwidth_of_a_slow_link_takes_no_time(monkeypatch):
    ring = SlowRing(10.0)
    ring.clock = Clock()
    monkeypatch.setattr(link_speed, "time", ring.clock)
    start = ring.clock.perf_counter()
    assert link_speed.measure_hop(ring) == pytest.approx(125e6, rel=0.3)
    assert ring.clock.perf_counter() - start < 3 and 12e6 < ring.sent < 100e6


def test_what_breaks_a_link_names_it(monkeypatch):
    """The name has the ranks of the ring, not those of the pair."""

    def broken(pair):
        raise RingError("rank 1 (mac) left")

    monkeypatch.setattr(link_speed, "_latency", broken)
    with pytest.raises(RingError, match=r"^link 2-0: rank 1 \(mac\) left$"):
        link_speed.measure_link(SoloRing(10.0), (2, 0))


def test_size_that_takes_long_enough():
    assert link_speed.next_size(1 << 20, 0.05) == 1 << 21
    assert (
        link_speed.next_size(1 << 20, 1e-9) == link_speed.MOST
        and link_speed.next_size(1 << 18, 100) == link_speed.LEAST
    )

"""The doctor's look at links: who sends to whom, and that whoever is not asked rests."""

from __future__ import annotations

import pytest

from ringattn.doctor import link_speed
from ringattn.transport.environment import launched_by

# The doctor measures over MPI: a link is a ring of two, and mx.distributed cannot divide its ranks.
pytestmark = pytest.mark.skipif(launched_by() == "mlx", reason="mx.distributed has no split")


@pytest.fixture(autouse=True)
def short_messages(monkeypatch):
    """The figures do not count here. Messages that take long enough to time have 32 MB."""
    monkeypatch.setattr(link_speed, "MOST", 1 << 20)


def test_every_link_is_measured_by_its_two_ends(ring):
    for ranks in link_speed.pairs(ring.size):
        link = link_speed.measure_link(ring, ranks)
        assert (link is not None) == (ring.rank in ranks)
        if link is not None:
            assert link.ranks == ranks and 0 < link.latency < 10 and link.slowest > 1e5


def test_who_sends(ring, monkeypatch):
    """To the right the first of the two alone, to the left the other, then both."""
    sent = []

    def bandwidth(pair, senders):
        before = pair.bytes_sent
        link_speed._transfer(pair, senders, 1000, (1,))
        sent.append(pair.bytes_sent - before)
        return 1.0

    monkeypatch.setattr(link_speed, "_bandwidth", bandwidth)
    for ranks in link_speed.pairs(ring.size):
        link_speed.measure_link(ring, ranks)
        expected = {ranks[0]: [1000, 0, 1000], ranks[1]: [0, 1000, 1000]}.get(ring.rank, [])
        assert sent == expected
        sent.clear()


def test_a_hop_uses_all_links(ring, monkeypatch):
    """Both ways around where ranks are on different hosts."""
    if ring.size == 1:
        return
    for hosts in (ring.hosts, tuple(f"mac{i}" for i in range(ring.size))):
        monkeypatch.setattr(ring, "hosts", hosts)
        before, ring.trace = ring.bytes_sent, []
        assert link_speed.measure_hop(ring) > 1e5
        trace, ring.trace = ring.trace, None
        assert ring.bytes_sent - before >= link_speed.REPEATS * link_speed.LEAST
        first = [event.bytes for event in trace if event.kind == "send"][:2]
        assert first[0] == (link_speed.LEAST // 2 if ring.neighbours_on_other_hosts else link_speed.LEAST)

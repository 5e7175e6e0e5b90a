"""Files of traces: JSON for Perfetto, and the picture."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ringattn.tracing import files, picture
from ringattn.tracing.chrome import to_json
from ringattn.tracing.spans import RESULTS, Event
from ringattn.tracing.tracks import Track, lanes, within


def made_up(ranks: int, layers: int = 4, size: int = 512) -> list[Track]:
    """Tracks of calls of one second each."""
    tracks = []
    for rank in range(ranks):
        zero = 1e9 + 0.001 * rank
        events = []
        for layer in range(layers):
            for hop in range(ranks):
                start = zero + layer + 0.1 * hop
                events.append(Event("compute", hop, start, start + 0.09, 0, "ring_attention", "pass_kv"))
                events.append(Event("send", hop, start, start + 0.03, size, "ring_attention", "pass_kv"))
            stop = zero + layer + 0.9
            events.append(Event("call", 0, zero + layer, stop, size * ranks, "ring_attention", "pass_kv"))
            events.append(Event("call", 0, stop, stop + 0.05, 0, "barrier"))
        tracks.append(Track(rank, f"mac{rank}", events, 2e-5, 7))
    return tracks


# JSON


def test_a_rank_is_a_process_with_threads_for_work_sends_and_receives() -> None:
    tracks = [Track(1, "mac1", [Event("compute", 0, 5.0, 6.0), Event("send", 0, 5.0, 5.5), Event("recv", 0, 5.5, 6.0)])]
    events = to_json(tracks)["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rank 1 (mac1)"]
    spans = {e["cat"]: (names[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans == {"compute": ("main", 0, 1e6), "send": ("send", 0, 5e5), "recv": ("receive", 5e5, 5e5)}


def test_spans_carry_hop_strategy_and_bytes() -> None:
    event = Event("send", RESULTS + 2, 1.0, 2.0, 99, "ring_attention", "pass_q")
    (span,) = (e for e in to_json([Track(0, "mac", [event])])["traceEvents"] if e["ph"] == "X")
    assert span["name"] == "send: result of hop 2"
    assert span["args"] == {"bytes": 99, "call": "ring_attention", "strategy": "pass_q", "hop": 2}


def test_no_spans_of_a_thread_overlap_unless_one_is_within_the_other() -> None:
    track = made_up(3)[0]
    extra = [Event("send", 9, e.start + 0.01, e.stop + 0.01, 1) for e in track.events if e.kind == "send"]
    spans = [e for e in to_json([Track(0, "mac", [*track.events, *extra])])["traceEvents"] if e["ph"] == "X"]
    for thread in {span["tid"] for span in spans}:
        open_until: list[float] = []
        for span in sorted((s for s in spans if s["tid"] == thread), key=lambda s: (s["ts"], -s["dur"])):
            while open_until and open_until[-1] <= span["ts"] + 0.5:
                open_until.pop()
            assert not open_until or span["ts"] + span["dur"] <= open_until[-1] + 0.5
            open_until.append(span["ts"] + span["dur"])
    assert sum(span["cat"] == "send" for span in spans) == 2 * 12


def test_the_file_says_what_is_uncertain_and_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    files.write(made_up(2), path)
    about = json.loads(path.read_text())["otherData"]
    assert about["largest_clock_error_us"] == {"0": 20.0, "1": 20.0} and about["dropped_events"] == {"0": 7, "1": 7}


def test_names_of_several_files_survive_the_variable(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.png"]
    assert files.split_names(files.join_names(paths)) == paths
    assert files.split_names("") == []


# The picture


@pytest.mark.parametrize("suffix", files.PICTURES)
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"ring{suffix}"
    files.write(made_up(4), path)
    content = path.read_bytes()
    if suffix == ".png":
        assert struct.unpack(">I", content[16:20]) == (900,)  # the width of a README
    else:
        assert b"<svg" in content


@pytest.mark.parametrize("tracks", [[Track(0, "mac", [])], [Track(0, "mac", [Event("exchange", 0, 1.0, 2.0)])]])
def test_a_trace_without_attention_is_drawn(tmp_path: Path, tracks: list[Track]) -> None:
    pytest.importorskip("matplotlib")
    files.write(tracks, tmp_path / "ring.png")
    assert (tmp_path / "ring.png").exists()


def test_the_picture_shows_two_calls_in_the_middle() -> None:
    assert picture.window(made_up(4)) == pytest.approx((1e9 + 1, 1e9 + 2.903))


def test_the_picture_shows_the_kind_of_calls_that_takes_the_longest() -> None:
    short = [
        event._replace(start=event.start + 50, stop=event.stop + 50 - 0.02 * (event.kind == "call"))
        for event in made_up(1, layers=3, size=1)[0].events
    ]
    tracks = [Track(0, "mac", [*short, *made_up(1, layers=4)[0].events])]
    assert picture.window(tracks) == pytest.approx((1e9 + 1, 1e9 + 2.9))


def test_the_picture_shows_calls_that_send_blocks() -> None:
    (track,) = made_up(1)
    decoding = [
        Event("compute", 0, 1e9 + 10, 1e9 + 90, 0, "decode_attention"),
        Event("call", 0, 1e9 + 10, 1e9 + 90, 0, "decode_attention"),
    ]
    assert picture.window([Track(0, "mac", [*track.events, *decoding])]) == pytest.approx((1e9 + 1, 1e9 + 2.9))


def test_parts_of_events_within_a_window() -> None:
    events = within(made_up(4)[0].events, 1e9 + 0.05, 1e9 + 0.25)
    found = {(e.kind, e.hop) for e in events if e.kind != "call"}
    assert found == {("compute", 0), ("compute", 1), ("compute", 2), ("send", 1), ("send", 2)}
    assert events[0].start == 1e9 + 0.05 and max(e.stop for e in events) == 1e9 + 0.25


def test_sends_that_overlap_get_lanes_of_their_own() -> None:
    intervals = [(0, 4), (1, 2), (2, 3), (2.5, 6), (4, 5)]
    assert lanes([Event("send", 0, *interval) for interval in intervals]) == [0, 1, 1, 2, 0]

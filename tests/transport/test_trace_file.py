"""Files of traces, written by the ranks of a ring: the events of all of them, also when the ring broke."""

from __future__ import annotations

import gc
import json
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import mlx.core as mx
import pytest
from spawn import Result, spawn, spawn_mlx

import ringattn as ra
from ringattn.tracing import spans as spans_module
from ringattn.tracing.files import VARIABLE
from ringattn.tracing.spans import NO_TRACER, Recorder
from ringattn.transport import init

PROGRAM = """
import sys
import mlx.core as mx
import ringattn as ra

mx.set_default_device(mx.cpu)
with ra.init(timeout=20) as ring:
    layout = ra.Layout.zigzag(64, ring.size)
    x = mx.ones((1, 2, layout.local_length(ring.rank), 8))
    for strategy in ("pass_kv", "pass_q"):
        mx.eval(ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal", strategy=strategy))
    if sys.argv[1] == "fail" and ring.rank == 1:
        raise ValueError("only here")
    if sys.argv[1] == "split":
        with ring.split(ring.rank % 2) as half:
            half.barrier()
    ring.barrier()
"""


def run(transport: str, size: int, path: Path, *arguments: str) -> list[Result]:
    line = ["-c", PROGRAM, *arguments]
    if transport == "mpi":
        return [spawn(size, line, timeout=60, env={VARIABLE: str(path)})]
    return spawn_mlx(size, line, timeout=60, env={VARIABLE: str(path)})


def spans(path: Path) -> list[dict]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


@pytest.mark.ranks
@pytest.mark.parametrize("transport", ["mpi", "mlx"])
def test_all_ranks_are_in_one_file(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    results = run(transport, 3, path, "")
    assert all(result.code == 0 for result in results), "\n".join(map(str, results))
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    found = spans(path)
    for rank in range(3):
        own = [span for span in found if span["pid"] == rank]
        assert {"compute", "send", "recv", "call", "exchange"} <= {span["cat"] for span in own}
        calls = [span["name"] for span in own if span["cat"] == "call"]
        assert [name for name in calls if name.startswith("ring_attention")] == [
            "ring_attention pass_kv",
            "ring_attention pass_q",
        ]
        sends = [span["args"] for span in own if span["cat"] == "send"]
        assert all(one["bytes"] > 0 and one["strategy"] in ("pass_kv", "pass_q") for one in sends)
    sent = [sum(s["args"]["bytes"] for s in found if s["cat"] == kind) for kind in ("send", "recv")]
    assert sent[0] == sent[1] > 0


@pytest.mark.ranks
def test_clocks_of_one_host_agree_and_calls_overlap(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run("mpi", 2, path, "")
    barriers = [span for span in spans(path) if span["name"] == "barrier"]
    begin, end = (
        max(span["ts"] for span in barriers[-2:]),
        min(span["ts"] + span["dur"] for span in barriers[-2:]),
    )
    assert len(barriers) == 2 and begin <= end  # nobody leaves a barrier before all have come


@pytest.mark.ranks
def test_the_rings_of_a_split_are_in_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    (result,) = run("mpi", 2, path, "split")
    assert result.code == 0, str(result)
    names = [span["name"] for span in spans(path) if span["pid"] == 1 and span["cat"] == "call"]
    assert names[-3:] == ["split", "barrier", "barrier"]


@pytest.mark.ranks
@pytest.mark.parametrize("transport", ["mpi", "mlx"])
def test_ranks_of_a_broken_ring_write_their_own_events(transport: str, tmp_path: Path) -> None:
    results = run(transport, 2, tmp_path / "trace.json", "fail")
    assert any("only here" in result.output for result in results)
    assert all(result.code not in (0, None) for result in results), "\n".join(map(str, results))
    for rank in range(2):
        found = spans(tmp_path / f"trace.rank{rank}.json")
        assert {span["pid"] for span in found} == {rank} and any(span["cat"] == "compute" for span in found)


def test_one_process_needs_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trace.json"))
    monkeypatch.setattr("ringattn.transport.trace_file._opened", 0)
    for _ in range(2):
        with init("solo") as ring:
            ring.barrier()
            ring.close()  # closing twice writes once
    assert sorted(file.name for file in tmp_path.iterdir()) == ["trace.2.json", "trace.json"]
    assert [span["name"] for span in spans(tmp_path / "trace.json") if span["cat"] == "call"] == ["barrier"]


def test_a_file_that_cannot_be_written_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none" / "trace.json"))
    monkeypatch.setattr("ringattn.transport.trace_file._opened", 0)
    with init("solo"):
        pass
    error = capfd.readouterr().err
    assert error.startswith("ringattn: trace: ") and "cannot be written" in error and error.count("\n") == 1


def test_the_latest_events_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trace.json"))
    monkeypatch.setattr("ringattn.transport.trace_file._opened", 0)
    monkeypatch.setattr("ringattn.transport.trace_file.MOST", 4)
    with init("solo") as ring:
        for _ in range(10):
            ring.barrier()
    assert len(spans(tmp_path / "trace.json")) == 4
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["dropped_events"] == {"0": 16}


def path_of(call: Callable[[], object]) -> list[CodeType]:
    """Python functions that `call` runs, in order, without those of tracers."""
    path: list[CodeType] = []
    gc.collect()
    gc.disable()  # destructors of what earlier tests left behind are not part of the path
    sys.setprofile(lambda frame, what, _: path.append(frame.f_code) if what == "call" else None)
    call()
    sys.setprofile(None)
    gc.enable()
    return [code for code in path if code.co_filename != spans_module.__file__]


@pytest.mark.parametrize("what", ["barrier", "all_reduce", "decode_attention", "ring_attention", "gradient"])
def test_a_traced_call_takes_the_same_path(what: str) -> None:
    with ra.init("solo") as ring:
        layout = ra.Layout.contiguous(8, 1)
        x = mx.ones((1, 1, 8, 8))

        def attend(q: mx.array) -> mx.array:
            return ra.ring_attention(q, x, x, ring=ring, layout=layout).sum()

        calls: dict[str, Callable[[], Any]] = {
            "barrier": ring.barrier,
            "all_reduce": lambda: ring.all_reduce(x),
            "decode_attention": lambda: ra.decode_attention(x[:, :, :1], x, x, ring=ring, kv_layout=layout),
            "ring_attention": lambda: attend(x),
            "gradient": lambda: mx.eval(mx.grad(attend)(x)),
        }
        recorder = Recorder(events := deque[tuple](), plain=True)
        paths = []
        for tracer in (NO_TRACER, recorder, NO_TRACER, recorder):  # the first two fill caches
            ring.tracer = tracer
            paths.append(path_of(calls[what]))
    assert events and paths[2] and paths[2] == paths[3]

"""Recording of spans: labels, nesting, and a tracer that records nothing."""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter, deque
from typing import Any

import pytest

from ringattn.tracing.spans import NO_TRACER, Event, Recorder, Tracer


def test_spans_carry_the_call_and_its_strategy() -> None:
    events: list[Event] = []
    tracer = Recorder(events)
    begin = time.time()
    tracer.begin("ring_attention")
    tracer.choose("pass_q")
    with tracer.span("compute", 1):
        pass
    tracer.add("send", 2, begin, begin + 1, 512)
    tracer.end()
    with tracer.span("exchange", 0, 5):
        pass
    assert [(e.kind, e.hop, e.bytes, e.call, e.strategy) for e in events] == [
        ("compute", 1, 0, "ring_attention", "pass_q"),
        ("send", 2, 512, "ring_attention", "pass_q"),
        ("call", 0, 512, "ring_attention", "pass_q"),
        ("exchange", 0, 5, "", ""),
    ]
    call = events[2]
    assert begin <= call.start <= events[0].start <= events[0].stop <= call.stop <= time.time()


def test_a_nested_call_keeps_the_labels_of_the_outer_one() -> None:
    events: list[Event] = []
    tracer = Recorder(events)
    tracer.begin("outer")
    tracer.choose("pass_kv")
    tracer.begin("inner")
    tracer.end()
    tracer.end()
    assert [(e.call, e.strategy) for e in events] == [("inner", ""), ("outer", "pass_kv")]


def test_spans_may_be_nested() -> None:
    events: list[Event] = []
    tracer = Recorder(events)
    with tracer.span("compute", 1), tracer.span("wait", 2):
        pass
    assert [(e.kind, e.hop) for e in events] == [("wait", 2), ("compute", 1)]
    assert events[1].start <= events[0].start <= events[0].stop <= events[1].stop


def test_a_span_around_another_goes_on_after_it() -> None:
    events: list[Event] = []
    tracer = Recorder(events)
    with tracer.span("compute", 1, 7):
        for hop in (2, 3):
            with tracer.span("wait", hop):
                pass
    assert [(e.kind, e.hop, e.bytes) for e in events] == [("wait", 2, 0), ("wait", 3, 0), ("compute", 1, 7)]


def test_events_that_a_deque_dropped_are_counted() -> None:
    tracer = Recorder(deque(maxlen=2))
    for hop in range(5):
        with tracer.span("wait", hop):
            pass
    assert tracer.added == 5


def test_a_span_that_fails_is_recorded() -> None:
    events: list[Event] = []
    with pytest.raises(ValueError), Recorder(events).span("wait", 3):
        raise ValueError
    assert [(e.kind, e.hop) for e in events] == [("wait", 3)]


def test_a_trace_may_begin_within_a_call() -> None:
    events: list[Event] = []
    Recorder(events).end()
    assert events == []


def test_no_tracer_records_nothing() -> None:
    NO_TRACER.begin("x")
    NO_TRACER.choose("y")
    NO_TRACER.add("send", 0, 0.0, 1.0)
    with NO_TRACER.span("compute", 0):
        pass
    NO_TRACER.end()
    assert NO_TRACER.events is None


def profile(tracer: Tracer) -> tuple[int, Counter[str]]:
    """Python frames and calls of C functions of a call with one span and one message."""
    frames = 0
    functions: Counter[str] = Counter()

    def note(_: Any, what: str, function: Any) -> None:
        nonlocal frames
        frames += what == "call"
        if what == "c_call":
            functions[function.__name__] += 1

    sys.setprofile(note)
    tracer.begin("decode_attention")
    with tracer.span("compute", 0, 8):
        pass
    tracer.add("send", 0, 1.0, 2.0, 8)
    tracer.end()
    sys.setprofile(None)
    del functions["setprofile"]
    return frames, functions


def test_a_span_calls_only_the_clock_and_one_append() -> None:
    """Code that runs once per layer is not in the caches: a call costs there several times what it does in a loop."""
    frames, functions = profile(NO_TRACER)
    assert (frames, functions) == (6, {})
    # The clock at both ends of the call and of the span; three events.
    assert profile(Recorder(deque(), plain=True)) == (frames, {"time": 4, "append": 3})


def test_plain_tuples_have_the_fields_of_events() -> None:
    """A collection of garbage visits a tuple of plain values once, and an event again and again."""
    events: deque[tuple] = deque()
    tracer = Recorder(events, plain=True)
    tracer.begin("ring_attention")
    tracer.choose("pass_kv")
    with tracer.span("exchange", 3, 3):
        pass
    tracer.end()
    gc.collect()
    assert [type(one) for one in events] == [tuple, tuple] and not any(map(gc.is_tracked, events))
    span, call = (Event(*one) for one in events)
    assert span[:2] == ("exchange", 3) and span[4:] == (3, "ring_attention", "pass_kv")
    assert call[:2] == ("call", 0) and call[4:] == (0, "ring_attention", "pass_kv")
    assert call.start <= span.start <= span.stop <= call.stop

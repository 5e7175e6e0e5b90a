"""One record of why a ring broke: what it says, and that nothing is lost on the way to another rank."""

from __future__ import annotations

import pytest

from ringattn.transport.failures.cause import Cause

PLACE = ("ring_attention", 2)
CAUSES = {
    "rank 1 (mac1) failed in ring_attention, hop 2: ValueError: {boom}": Cause.of_exception(
        ValueError("{boom}"), 1, "mac1", *PLACE
    ),
    "rank 1 (mac1) failed before its first call: SystemExit: 5": Cause.of_exception(SystemExit(5), 1, "mac1", "", 0),
    "rank 1 (mac1) gave no sign of life for 3 s; it was last heard of after barrier. Look": Cause(
        "silent", 1, "mac1", "after barrier", 0, "3 s", ". Look"
    ),
    "rank 1 (mac1) died: its connection was closed; it was last heard of in ring_attention, hop 2": Cause(
        "disconnected", 1, "mac1", *PLACE
    ),
    "rank 1 (mac1) left the ring while rank 0 waited for it in ring_attention, hop 2": Cause(
        "left", 1, "mac1", *PLACE, "rank 0"
    ),
    "8 bytes to rank 1 (mac1) are stuck in ring_attention, hop 2: look": Cause(
        "stuck", 1, "mac1", *PLACE, "8 bytes to", ": look"
    ),
    "rank 1 (mac1) exited with code 7 in init": Cause.of_end("1", "mac1", 7, {"call": "init"}),
    "rank 1 (mac1): its wrapper was killed": Cause("unwatched", 1, "mac1"),
    "rank 1 (mac1): the connection to it was lost": Cause("lost", 1, "mac1"),
    "all is lost": Cause("other", None, None, detail="all is lost"),
}


@pytest.mark.parametrize("sentence", CAUSES)
def test_a_cause_says_what_happened_also_on_another_rank(sentence: str) -> None:
    cause = CAUSES[sentence]
    arrived = Cause.decode(cause.encode())
    assert arrived == cause
    assert str(arrived) == str(arrived.error) == sentence
    assert (arrived.error.rank, arrived.error.host, arrived.error.hop) == (cause.rank, cause.host, cause.hop)


def test_a_long_cause_is_cut_on_the_way() -> None:
    cause = Cause("other", 1, "mac1", detail="x" * 10_000)
    assert len(cause.encode()) < 5_000 and len(str(cause)) == 10_000


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError(), 1), (SystemExit(5), 5), (SystemExit(0), 1), (SystemExit(None), 1), (SystemExit(256), 1)],
)
def test_no_failure_ends_with_0(error: BaseException, code: int) -> None:
    assert Cause.of_exception(error, 1, "mac1", "", 0).exit_code == code

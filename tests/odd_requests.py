"""Bodies of requests as no client should send them, for hypothesis."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import strategies as st

FUZZ_SECONDS = int(os.environ.get("RINGATTN_FUZZ_SECONDS", "10"))  # for each test that sends odd requests
MESSAGES = [{"role": "user", "content": "x"}]

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
near = st.sampled_from(
    [0, 1, -1, 2, 0.5, 1.0, 1e-9, 20, 21, 49, 50, 2**31, 10**400, True, False, "", "auto", "none", "x", [], ["x"], {}]
    + [{"type": "text"}, {"include_usage": True}, {"5": 100}, {"enable_thinking": False}, MESSAGES, ["text"], [None]]
)


def bodies(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of a request: usually with what is needed, and with odd values of known and unknown fields."""
    from ringattn.lm.server.api.requests import HARMLESS, RULES

    names = st.sampled_from(sorted([*RULES[kind], *HARMLESS])) | st.text(max_size=9)
    needed = st.just({"messages": MESSAGES} if kind == "chat" else {"prompt": "x"})
    return st.builds(lambda a, b: {**a, **b}, needed, st.dictionaries(names, near | junk, max_size=3))

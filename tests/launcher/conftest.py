"""Fixtures of the launcher's tests."""

from __future__ import annotations

import pytest
from launching import RANK


@pytest.fixture
def script(tmp_path):
    """Write a program and return its path. It knows its `rank`."""

    def write(body: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(RANK + body)
        return str(path)

    return write

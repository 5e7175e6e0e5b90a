"""What the tests of the CUDA backend share."""

from __future__ import annotations

import pytest

from ringattn.core.kept import Kept
from tools.nvidia.kernels import KEPT


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch):
    """A function that forgets what is kept for equal calls."""

    def clear() -> None:
        for module, name in KEPT:
            monkeypatch.setattr(module, name, Kept(64))

    return clear


@pytest.fixture(autouse=True)
def nothing_kept(forget) -> None:
    """Tests change what plans and kernels depend on."""
    forget()

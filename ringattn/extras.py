"""Optional packages: asked for by name before the work that needs them begins."""

from __future__ import annotations

import importlib.util

from .errors import MissingExtraError


def require(module: str, install: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        module: The package's import name, such as ``"matplotlib"``.
        install: What pip has to install for it, such as ``"ringattn[plot]"``.

    Raises:
        MissingExtraError: The package is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"{module} is not installed: pip install '{install}'")

"""Checks for optional packages, before the work that needs them begins."""

from __future__ import annotations

import importlib.util

from .errors import MissingExtraError


def require(module: str, install: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        module: The package's import name, such as ``"matplotlib"``.
        install: The requirement that pip must install, such as ``"ringattn[plot]"``.

    Raises:
        MissingExtraError: If the package is not installed. The message says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"{module} is not installed: pip install '{install}'")

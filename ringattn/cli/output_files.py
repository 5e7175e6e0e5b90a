"""Checks of the files that a command is to write, before the work whose results they get."""

from __future__ import annotations

import os
from pathlib import Path


def problem_with(path: Path) -> str | None:
    """Reason for which a file cannot be written; ``None`` where nothing is known against it."""
    if path.exists():  # in a folder that need not be writable: /dev/stdout
        return None if os.access(path, os.W_OK) else "the file cannot be written to"
    return problem_with_folder(path)


def problem_with_folder(path: Path) -> str | None:
    """Reason for which no new files can be made beside `path`; ``None`` where nothing is known against it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {path.parent}"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"the folder {path.parent} cannot be written to"

"""Files of traces: their names and formats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .tracks import Track

VARIABLE = "RINGATTN_TRACE"  # of the environment: names of files, separated as in PATH
PICTURES = (".png", ".svg")
SUFFIXES = (".json", *PICTURES)


def join_names(paths: Iterable[Path]) -> str:
    """Value of `VARIABLE` for these files."""
    return os.pathsep.join(str(path.absolute()) for path in paths)


def split_names(value: str) -> list[Path]:
    """Files that the value of `VARIABLE` names."""
    return [Path(name) for name in value.split(os.pathsep) if name]


def write(tracks: Sequence[Track], path: Path) -> None:
    """Write a trace to `path`: a picture if its name ends so, else JSON for Perfetto.

    Raises:
        OSError: The file cannot be written.
        ImportError: matplotlib is not installed, and `path` is a picture.
    """
    if path.suffix.lower() in PICTURES:
        from .picture import draw

        draw(tracks, path)
        return
    from .chrome import to_json

    path.write_text(json.dumps(to_json(tracks)))

"""Atomic writes: a reader never sees half of a file, and files of failed writes are removed.

A rank holds a lock on its file from the file's creation until the manifest names it. A file without a lock that no
manifest names is left from a process that died, or from an older save.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import mlx.core as mx

DATA = ".safetensors"
NEW = ".new"


class Part:
    """A rank's file and its copy of the manifest while they are written. Both are removed if that fails.

    Args:
        path: The path of the manifest.
        name: A unique name for this part.

    Attributes:
        complete: Whether all ranks' parts are on disk. From then on the file stays, since a manifest may name it.
    """

    def __init__(self, path: Path, name: str):
        self.path = path
        self.data = path.with_name(f"{path.name}.{name}{DATA}")
        self._new = path.with_name(f"{path.name}.{name}{NEW}")
        self.complete = False
        self._lock: int | None = None

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if self._lock is None:
            return
        if kind is not None:
            for file in (self._new,) if self.complete else (self._new, self.data):
                with suppress(OSError):
                    file.unlink()
        os.close(self._lock)

    def write(self, arrays: dict[str, mx.array]) -> None:
        """Write the arrays to disk. Raise OSError if that fails."""
        self._lock = _created(self.data)
        try:
            mx.save_safetensors(str(self.data), arrays)
        except RuntimeError as error:  # MLX's own type for it
            raise OSError(f"{self.data}: cannot be written: {error}") from None
        sync(self.data)

    def write_manifest(self, text: str) -> None:
        """Write the manifest to disk, under a temporary name. Raise OSError if that fails."""
        self._new.write_text(text)
        sync(self._new)
        sync(self.path.parent)

    def publish(self) -> None:
        """Replace the old manifest by the new one in one step. Raise OSError if that fails."""
        os.replace(self._new, self.path)
        sync(self.path.parent)


def _created(file: Path) -> int:
    """Create a file; return its descriptor, with a lock."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # `sweep` removed it before it was locked


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path, named: Callable[[], Collection[str]]) -> None:
    """Remove the files beside the manifest `path` that no process is writing and that are not `named` in it."""
    ours = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{12}}-\d+(of\d+)?({re.escape(DATA)}|{re.escape(NEW)})")
    for file in sorted(path.parent.iterdir()):
        # The lock is checked first: after a process has released it, its manifest is in place or never will be.
        if ours.fullmatch(file.name) and not _is_written(file.with_suffix(DATA)) and file.name not in named():
            with suppress(OSError):  # another rank has removed it, or it belongs to another user
                file.unlink()


def _is_written(file: Path) -> bool:
    """Whether another process holds the lock on a file."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(descriptor)
    return False

"""Files that are written so that nobody finds half of one, and nothing for ever stays of what failed.

A saver holds a lock on its file from its creation until the manifest names it. What is locked by nobody and named by
no manifest is of a saver that is dead or was overtaken.
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

DATA, NEW = ".safetensors", ".new"


class Part:
    """A rank's file, and its copy of the manifest, while they are written: what remains of them if that fails is gone.

    Args:
        path: The manifest.
        name: Of this part, which no other has.

    Attributes:
        complete: Whether all ranks' parts are on disk. From then on the file stays, as a manifest may name it.
    """

    def __init__(self, path: Path, name: str):
        self.path = path
        self.data, self._new = (path.with_name(f"{path.name}.{name}{kind}") for kind in (DATA, NEW))
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
        """Put the arrays on the disk. Raises OSError."""
        self._lock = _created(self.data)
        try:
            mx.save_safetensors(str(self.data), arrays)
        except RuntimeError as error:  # how MLX says it
            raise OSError(f"{self.data}: cannot be written: {error}") from None
        sync(self.data)

    def write_manifest(self, text: str) -> None:
        """Put it on the disk, not yet at its place. Raises OSError."""
        self._new.write_text(text)
        sync(self._new)
        sync(self.path.parent)

    def publish(self) -> None:
        """Put the manifest at its place in one step: there is the old one or the new one. Raises OSError."""
        os.replace(self._new, self.path)
        sync(self.path.parent)


def _created(file: Path) -> int:
    """A new file, open and locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # swept away before it was locked


def sync(path: Path) -> None:
    """See to it that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path, named: Callable[[], Collection[str]]) -> None:
    """Remove the files beside the manifest `path` that nobody writes and that are not `named` in it."""
    ours = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{12}}-\d+(of\d+)?({re.escape(DATA)}|{re.escape(NEW)})")
    for file in sorted(path.parent.iterdir()):
        # In this order: a saver that is gone has put the manifest in place that names its file, or never will.
        if ours.fullmatch(file.name) and not _is_written(file.with_suffix(DATA)) and file.name not in named():
            with suppress(OSError):  # another rank was faster, or it is not ours to remove
                file.unlink()


def _is_written(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # of a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False

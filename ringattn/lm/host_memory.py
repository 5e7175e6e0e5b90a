"""The memory that a rank may use: the host's, a cgroup's or the GPU's, or what the environment says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from ..core.device import uses_gpu
from ..errors import ArgumentError
from ..transport.interface import Transport

MEMORY = "RINGATTN_MEMORY"  # environment variable: memory of a rank, such as 96G, in the place of what is found
USABLE = 0.95  # of the memory of a host without Metal, which says itself what programs may use
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
UNLIMITED = 1 << 50  # bytes; a limit of a cgroup above this is none


def memory_of_rank(ring: Transport) -> int:
    """Bytes of memory that this rank may use. Ranks on one host have equal parts of its memory.

    Raises:
        ArgumentError: The environment variable `MEMORY` is not a size.
    """
    given = os.environ.get(MEMORY)
    if given is not None:
        return parse_bytes(MEMORY, given)
    own_gpu = uses_gpu() and not mx.metal.is_available()
    here = 1 if own_gpu else ring.hosts.count(ring.hosts[ring.rank])
    return usable_memory() // here


def usable_memory() -> int:
    """Bytes of this host, or of the GPU of a rank that has one of its own, that the ranks may use."""
    gpu = uses_gpu()
    info = mx.device_info() if gpu else {}
    if gpu and not mx.metal.is_available():
        return int(info.get("total_memory") or info.get("memory_size") or UNLIMITED)  # a rank has a GPU of its own
    whole = info.get("max_recommended_working_set_size") or USABLE * min(_physical(), *cgroup_limits())
    return int(whole)


def parse_bytes(name: str, text: str) -> int:
    """Bytes of a text such as ``96G``, ``512M`` or ``1.5G``, with units of 1,024.

    Raises:
        ArgumentError: `text`, the value of `name`, is not a size of at least 1M. A smaller one has lost its unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not found:
        raise ArgumentError(f"{name}: {text!r}, expected bytes, or a number with K, M or G, such as 96G")
    if size < UNITS["M"]:
        raise ArgumentError(f"{name}: {text!r}, expected at least 1M, such as 96G")
    return size


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Limits of the memory cgroups, of version 1 or 2, that this process is in, and `UNLIMITED`.

    Args:
        groups: File with the process's cgroups.
        mounted: Folder of all cgroups.
    """
    yield UNLIMITED
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = mounted / controllers
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root):
                    yield from _limit_in(folder)


def _limit_in(folder: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # else "max"
            yield int(text)

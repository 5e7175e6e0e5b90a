"""Introduction of the ranks before a ring is opened: an error on one of them is an error on all."""

from __future__ import annotations

import platform
from collections.abc import Callable

from .._version import __version__
from ..errors import ArgumentError, RingError
from .consensus import by_rank
from .environment import read_timeout
from .failures.heartbeats import Member
from .failures.status_file import status

DIFFERS = "ringattn differs between ranks: "  # the beginning of the error that the doctor recognises


def introduce(timeout: float | None, exchange: Callable[[list], list]) -> list[Member]:
    """Introduce this rank to all others and return all ranks of a new ring.

    Args:
        timeout: The timeout that the user gives on this rank.
        exchange: Sends a list that JSON can hold to every rank, and returns the lists of all ranks.

    Raises:
        ArgumentError: A timeout is wrong, here or on another rank.
        RingError: The ranks run different versions of ringattn.
    """

    error: ArgumentError | None = None
    seconds = 0.0
    try:
        seconds = read_timeout(timeout)
    except ArgumentError as wrong:
        error = wrong
    verdict = None if error is None else str(error)
    introductions = exchange([__version__, verdict, platform.node(), seconds, status.job_rank])
    if error is not None:
        raise error
    versions = [one[0] for one in introductions]  # in another version the other fields may have another meaning
    if len(set(versions)) > 1:
        raise RingError(f"{DIFFERS}{by_rank(versions)}; install the same version on all")
    for rank, (_, text, *_) in enumerate(introductions):
        if text is not None:
            raise ArgumentError(f"rank {rank}: {text}")
    return [Member(*about) for _, _, *about in introductions]

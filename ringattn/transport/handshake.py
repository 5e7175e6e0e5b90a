"""What ranks say of themselves before a ring is opened: what is wrong with one of them is an error on all."""

from __future__ import annotations

import platform
from collections.abc import Callable

from ..errors import ArgumentError, RingError
from .consensus import by_rank
from .environment import read_timeout
from .failures.heartbeats import Member
from .failures.status_file import status

DIFFERS = "ringattn differs between ranks: "  # how the error begins that the doctor tells from others


def introduce(timeout: float | None, exchange: Callable[[list], list]) -> list[Member]:
    """All ranks of a new ring.

    Args:
        timeout: This rank's, as a user gives it.
        exchange: Gives every rank what this one says, which JSON can hold, and returns what all have said.

    Raises:
        ArgumentError: A timeout is wrong, here or on another rank.
        RingError: The ranks run different versions of ringattn.
    """
    from .._version import __version__

    error: ArgumentError | None = None
    seconds = 0.0
    try:
        seconds = read_timeout(timeout)
    except ArgumentError as wrong:
        error = wrong
    told = exchange([__version__, None if error is None else str(error), platform.node(), seconds, status.job_rank])
    if error is not None:
        raise error
    versions = [one[0] for one in told]  # whatever else another version says may mean something else
    if len(set(versions)) > 1:
        raise RingError(f"{DIFFERS}{by_rank(versions)}; install the same version on all")
    for rank, (_, text, *_) in enumerate(told):
        if text is not None:
            raise ArgumentError(f"rank {rank}: {text}")
    return [Member(*about) for _, _, *about in told]

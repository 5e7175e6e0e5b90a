"""Rivals of the operator, one file each, by the name of the file.

`prepare(problem, way, rank, size)` of a file returns a `Work`. A file is imported only in the environment of its rival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Work:
    """Work of one rank.

    Attributes:
        positions: Positions of the rank's tokens, in their local order.
        call: Function to time: the forward pass, with the gradient where the problem asks for it.
        answer: Function that returns the results of a call as float32 arrays ``[heads, local tokens, dim]``: out, and
            dq, dk and dv where the problem asks for the gradient.
        barrier: Function that waits for all ranks.
        close: Function that undoes what `prepare` changed in the process.
    """

    positions: np.ndarray
    call: Callable[[], object]
    answer: Callable[[], list[np.ndarray]]
    barrier: Callable[[], None]
    close: Callable[[], object] = lambda: None

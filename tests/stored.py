"""Cache of float64 results, computed once for all tests and all ranks.

The same problem occurs with each backend, number of ranks and transport. Its exact result takes longer than the tested
code. The first process that needs a result stores it in a folder of this run, under a hash of its inputs. The others
read it there.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ringattn.verify import oracle

FOLDER = "RINGATTN_TEST_RESULTS"  # the environment variable with the folder
KEPT = 32  # results in the memory of a process
PATIENCE = 60.0  # s to wait for another process that computes the result

_memory: OrderedDict[str, Any] = OrderedDict()


def install() -> None:
    """Make the oracle use stored results. Without the environment variable it computes them."""
    for kind in (oracle.Case, oracle.GradientCase):
        for name in ("exact", "plain", "sizes", "budget"):
            if hasattr(kind, name) and FOLDER in os.environ:
                setattr(kind, name, stored(f"{kind.__name__}.{name}", getattr(kind, name)))


def stored(name: str, compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compute the result of a problem once for all processes; `name` distinguishes problems of another kind."""

    @wraps(compute)
    def result(problem: Any) -> Any:
        if FOLDER not in os.environ:
            return compute(problem)
        key = hashlib.sha256(b"".join(_parts((name, problem)))).hexdigest()
        if key not in _memory:
            _memory[key] = _from_folder(Path(os.environ[FOLDER]) / key, lambda: compute(problem))
        _memory.move_to_end(key)
        while len(_memory) > KEPT:
            _memory.popitem(last=False)
        return _memory[key]

    return result


def _parts(x: Any) -> Iterator[bytes]:
    """Yield the contents of `x` as bytes."""
    if isinstance(x, mx.array):
        x = mx.contiguous(x)
        mx.eval(x)
        yield f"{x.dtype}{x.shape}".encode()
        yield bytes(memoryview(x).cast("B")) if x.size else b""
    elif isinstance(x, np.ndarray):
        yield f"{x.dtype}{x.shape}".encode()
        yield x.tobytes()
    elif isinstance(x, (oracle.Case, oracle.GradientCase)):
        yield from _parts(vars(x))
    elif isinstance(x, dict):
        yield from _parts(list(x.items()))
    elif isinstance(x, (list, tuple)):
        yield f"{type(x).__name__}{len(x)}".encode()
        for part in x:
            yield from _parts(part)
    else:
        yield repr(x).encode()


def _from_folder(path: Path, compute: Callable[[], Any]) -> Any:
    """Read the result at `path`. The first process computes and stores it."""
    try:
        os.close(os.open(path.with_suffix(".begun"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                return pickle.loads(path.read_bytes())
            time.sleep(2e-3)
        return compute()
    result = compute()
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps(result))
    part.replace(path)
    return result

"""Results in float64 that many tests need, computed once for all of them and for all ranks.

The same problem comes up again with each backend, number of ranks and way of sending. Its exact answer takes longer
than what is tested, so that the first process to need it leaves it in a folder of this run, under a name made of all
that it depends on; the others read it there.
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

FOLDER = "RINGATTN_TEST_RESULTS"  # the environment variable that names it
KEPT = 32  # results that a process keeps in memory
PATIENCE = 60.0  # s in which another process may finish a result that it has begun

_memory: OrderedDict[str, Any] = OrderedDict()


def install() -> None:
    """Have the oracle look its results up. Without the environment variable it computes them."""
    for kind in (oracle.Case, oracle.GradientCase):
        for name in ("exact", "plain", "sizes"):
            if hasattr(kind, name) and FOLDER in os.environ:
                setattr(kind, name, _stored(f"{kind.__name__}.{name}", getattr(kind, name)))


def _stored(name: str, compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(compute)
    def result(problem: Any) -> Any:
        key = hashlib.sha256(b"".join(_parts((name, problem)))).hexdigest()
        if key not in _memory:
            _memory[key] = _from_folder(Path(os.environ[FOLDER]) / key, lambda: compute(problem))
        _memory.move_to_end(key)
        while len(_memory) > KEPT:
            _memory.popitem(last=False)
        return _memory[key]

    return result


def _parts(x: Any) -> Iterator[bytes]:
    """All that `x` is made of, as bytes."""
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
    """The result at `path`; made and put there by whoever comes first."""
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

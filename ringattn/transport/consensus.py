"""Agreement of all ranks that they are in the same call with the same arguments, before any data moves.

Every collective begins with one `Ring.exchange` whose payload starts with a *head* of fixed size: this rank's verdict
on its own arguments and a digest of the call. All ranks read all heads, so all decide the same: go on, raise the
error that one of them found, or exchange full descriptions of their calls and report the first difference.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError
from .interface import Transport
from .shared_input import TAG_BYTES, SharedInput

__all__ = ["Fields", "agree", "agree_in_graph", "fits_in_graph", "raise_on_all_ranks"]

Fields = tuple[tuple[str, str], ...]  # what describes a call: (argument, short text of its value)

IN_GRAPH = 256  # calls in MLX's graph that may be unchecked: the layers of two tokens
_HEAD_BYTES = 64
_HEAD = struct.Struct("<4sBxxxI24s")  # magic, verdict, bytes of error text, digest and tag; zeros up to _HEAD_BYTES
_TAG = slice(12 + 16, 12 + 16 + TAG_BYTES)  # of the ring's shared input, behind the digest of the call
_MAGIC = b"ra02"
_OK, _ERROR = 0, 1
_LONGEST_TEXT = 4096


def agree(
    ring: Transport,
    what: str,
    fields: Fields = (),
    error: BaseException | None = None,
    payload: Sequence[memoryview] = (),
    *,
    apart: bool = False,
) -> list[memoryview]:
    """Check that every rank is in the same call with the same `fields`, and return every rank's `payload`.

    Args:
        ring: The ring whose ranks must agree.
        what: The name of the call.
        fields: Values that must be equal on all ranks, as ``(name, short text)`` pairs.
        error: The error in this rank's own arguments, if any.
        payload: Bytes for all other ranks; their lengths may differ.
        apart: Whether the payload travels in a round of its own, because a rank that does not agree might not take part
            in a round of that size. All ranks must pass the same value or disagree otherwise.

    Returns:
        The payload of every rank, in rank order.

    Raises:
        ArgumentError: On every rank, when one rank has an error or the calls (or the rings' shared inputs) differ. The
            ring still works.
    """
    try:
        ring.check_pending()
    except ArgumentError as late:
        error = error or late
    sent = _head(ring, what, fields, error)
    if not apart and error is None:  # small: states of new tokens, halos, numbers
        sent = b"".join((sent, *payload))
    with ring.tracer.span("exchange", 0, len(sent)):
        heads = ring.exchange([memoryview(sent)])
    replies = _check(ring, what, fields, error, heads, ring.shared_input)
    return ring.exchange(payload) if apart else replies


def fits_in_graph(ring: Transport, count: int) -> bool:
    """Whether `agree_in_graph` can carry a payload of `count` bytes."""
    return _HEAD_BYTES + count <= ring.in_graph_bytes


def agree_in_graph(ring: Transport, what: str, fields: Fields, payload: mx.array) -> mx.array:
    """Agree without waiting, in MLX's graph. `payload` has the same shape and dtype on every rank, and fits.

    Returns:
        The payloads of all ranks, flat, as rows, of the same dtype. All are NaN where a rank does not agree; a later
        call of the ring then raises the error that `agree` would have raised.
    """
    try:
        ring.check_pending(keep=IN_GRAPH)
    except ArgumentError as late:
        agree(ring, what, fields, late)  # the other ranks may not have seen it
    own = mx.array(np.frombuffer(_good_head(what, fields), np.uint8))
    shared = ring.shared_input
    if shared is not None:
        own = mx.concatenate([own[: _TAG.start], shared.tag, own[_TAG.stop :]])
    data = mx.concatenate([own, payload.reshape(-1).view(mx.uint8)])
    replies = ring.exchange_in_graph(data, lambda heads: _check(ring, what, fields, None, heads, shared))
    same = mx.all(replies[:, :_HEAD_BYTES] == own)
    return mx.where(same, mx.contiguous(replies[:, _HEAD_BYTES:]).view(payload.dtype), mx.nan)


@contextmanager
def raise_on_all_ranks(ring: Transport, what: str) -> Iterator[None]:
    """Run local checks. An exception raised here is raised on every rank.

    An error of `mx.distributed` breaks the ring instead, because another rank's death is its cause.
    """
    try:
        yield
    except Exception as error:
        if is_lost_peer(error):
            ring.fail(error)
            raise
        agree(ring, what, (), error)
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether `mx.distributed` raised `error`: it does so where a connection to another rank is lost."""
    return isinstance(error, RuntimeError) and str(error).startswith(("[ring]", "[jaccl]", "[nccl]"))


def _head(ring: Transport, what: str, fields: Fields = (), error: BaseException | None = None) -> bytes:
    """The bytes before a rank's payload: a head of `_HEAD_BYTES`, and the text of `error` if there is one."""
    if error is not None:
        text = str(error).encode(errors="backslashreplace")[:_LONGEST_TEXT]
        return _HEAD.pack(_MAGIC, _ERROR, len(text), b"").ljust(_HEAD_BYTES, b"\0") + text
    head = _good_head(what, fields)
    shared = ring.shared_input
    return head if shared is None else head[: _TAG.start] + shared.tag_bytes + head[_TAG.stop :]


@lru_cache(maxsize=4096)
def _good_head(what: str, fields: Fields) -> bytes:
    digest = blake2b(_describe(what, fields), digest_size=16).digest()
    return _HEAD.pack(_MAGIC, _OK, 0, digest).ljust(_HEAD_BYTES, b"\0")


def _describe(what: str, fields: Sequence[tuple[str, ...]]) -> bytes:
    return json.dumps([what, fields]).encode()


def _check(
    ring: Transport,
    what: str,
    fields: Fields,
    error: BaseException | None,
    replies: Sequence[memoryview],
    shared: SharedInput | None,
) -> list[memoryview]:
    """Read the heads of all ranks' `replies`. Arguments, result and errors are those of `agree`."""
    if error is not None:
        raise error
    own = bytes(replies[ring.rank][:_HEAD_BYTES])
    if all(bytes(reply[:_HEAD_BYTES]) == own for reply in replies):
        return [reply[_HEAD_BYTES:] for reply in replies]
    digests = []
    for rank, reply in enumerate(replies):
        if len(reply) < _HEAD_BYTES or reply[:4] != _MAGIC:
            raise ArgumentError(f"rank {rank} sent something that {what} does not understand (another version?)")
        _, verdict, length, digest = _HEAD.unpack_from(reply)
        if verdict == _ERROR:
            raise ArgumentError(f"rank {rank}: {str(reply[_HEAD_BYTES : _HEAD_BYTES + length], 'utf-8', 'replace')}")
        digests.append(digest)
    if len(set(digests)) == 1:
        raise ArgumentError(f"{what}: the ranks run different versions of ringattn")
    # Every rank has seen that the digests differ, so every rank comes here, and the round is matched.
    table = (() if shared is None else (shared.field,)) + fields
    calls = [json.loads(bytes(text)) for text in ring.exchange([memoryview(_describe(what, table))])]
    raise ArgumentError(_difference(calls))


def _difference(calls: list[list]) -> str:
    """The first difference between `calls`, one ``[what, fields]`` per rank, and its remedy if it has one."""
    names = [call[0] for call in calls]
    if len(set(names)) > 1:
        return ", ".join(f"{_ranks(ranks)} called {name}" for name, ranks in _group(names).items())
    tables = [{name: rest for name, *rest in call[1]} for call in calls]
    for name in dict.fromkeys(name for table in tables for name in table):
        values, *remedies = zip(*(table.get(name, ["not given"]) for table in tables))
        if len(set(values)) > 1:
            text = f"{names[0]}: {name} differs between ranks: {by_rank(values)}"
            return f"{text}: {remedies[0][0]}" if remedies else text
    return f"{names[0]}: the order of its arguments differs between ranks"


def by_rank(values: Sequence[str]) -> str:
    """The value of every rank, in words: ``0.25 on ranks 0 and 2, 0.5 on rank 1``."""
    return ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in _group(values).items())


def _group(values: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return groups


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"

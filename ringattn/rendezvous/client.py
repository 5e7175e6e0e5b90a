"""Connection to a listener."""

from __future__ import annotations

import hmac
import socket
import time
from collections.abc import Sequence

from .handshake import (
    GREETING,
    HANDSHAKE_SECONDS,
    NONCE_BYTES,
    PROOF_BYTES,
    REFUSED,
    RESPONSE,
    caller_proof,
    listener_proof,
    make_nonce,
)

Address = tuple[str, int]  # an IP address or a name, and a port

_RETRY = 0.05  # s until the next attempt after a listener dropped the connection, as it does when strangers flood it


def format_endpoint(addresses: Sequence[Address], key: bytes) -> str:
    """Format a listener's addresses and key for an environment variable. Never for a command line."""
    return " ".join([*(f"{address},{port}" for address, port in addresses), key.hex()])


def parse_endpoint(text: str) -> tuple[list[Address], bytes]:
    """Undo `format_endpoint`.

    Raises:
        ValueError: `text` is no endpoint.
    """
    *places, key = text.split()
    pairs = (place.rpartition(",") for place in places)
    return [(address, int(port)) for address, _, port in pairs], bytes.fromhex(key)


def connect(addresses: Sequence[Address], key: bytes, rank: int, seconds: float = HANDSHAKE_SECONDS) -> socket.socket:
    """Return a connection to the listener with this key, blocking and without a timeout.

    Args:
        addresses: Addresses of the listener, tried in order.
        key: The key that both sides know.
        rank: The rank of the caller, 0 to 2 ** 32 - 1.
        seconds: Time for each address, until both sides have proved that they know the key.

    Raises:
        ConnectionError: The listener is at none of the addresses. The message gives the reason for each.
    """
    reasons = []
    for address, port in addresses:
        try:
            return _call((address, port), key, rank, time.monotonic() + seconds)
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
    raise ConnectionError(", ".join(reasons) or "no address")


def _call(address: Address, key: bytes, rank: int, deadline: float) -> socket.socket:
    while True:
        link = socket.create_connection(address, timeout=_left(deadline))
        try:
            _prove(link, key, rank, deadline)
            link.settimeout(None)
            return link
        except ConnectionError:  # dropped
            link.close()
            if time.monotonic() + _RETRY > deadline:
                raise
            time.sleep(_RETRY)
        except BaseException:
            link.close()
            raise


def _prove(link: socket.socket, key: bytes, rank: int, deadline: float) -> None:
    """Do the caller's side of the handshake."""
    if _read(link, len(GREETING), deadline) != GREETING:
        raise OSError("another program answers there")
    theirs = _read(link, NONCE_BYTES, deadline)
    mine = make_nonce()
    link.sendall(RESPONSE.pack(rank, mine, caller_proof(key, rank, theirs, mine)))
    proof = _read(link, PROOF_BYTES, deadline)
    if proof == REFUSED or not hmac.compare_digest(proof, listener_proof(key, rank, theirs, mine)):
        raise OSError("another machine or another run of ringattn answers there")


def _read(link: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        link.settimeout(_left(deadline))
        part = link.recv(count - len(data))
        if not part:
            raise ConnectionError("hung up during the handshake")
        data += part
    return data


def _left(deadline: float) -> float:
    """Seconds until `deadline`."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left

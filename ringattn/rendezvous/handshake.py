"""Mutual proof of a shared key, HMAC-SHA256 over fresh nonces of both sides. All messages have a fixed size.

    listener -> caller    greeting, nonce of the listener
    caller -> listener    rank of the caller, nonce of the caller, proof of the caller
    listener -> caller    proof of the listener; zeros where the proof of the caller is wrong

A proof covers the side that makes it, so the other side cannot send it back as its own. The listener proves nothing to
a caller that has not proved anything.
"""

from __future__ import annotations

import hmac
import os
import struct

HANDSHAKE_SECONDS = 5.0  # for the whole of it
KEY_BYTES = 32
NONCE_BYTES = 32
GREETING = b"ringattn rendezvous 1\n"
PROOF_BYTES = 32
CHALLENGE = struct.Struct(f"!{len(GREETING)}s{NONCE_BYTES}s")
RESPONSE = struct.Struct(f"!I{NONCE_BYTES}s{PROOF_BYTES}s")
REFUSED = bytes(PROOF_BYTES)

_CALLER = b"caller"
_LISTENER = b"listener"


def make_key() -> bytes:
    """A new key."""
    return os.urandom(KEY_BYTES)


def make_nonce() -> bytes:
    """Random bytes for one handshake."""
    return os.urandom(NONCE_BYTES)


def derive_key(key: bytes, purpose: str) -> bytes:
    """The key for one purpose: two listeners with keys of their own cannot be taken for each other."""
    return hmac.digest(key, purpose.encode(), "sha256")


def caller_proof(key: bytes, rank: int, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    """The proof that the caller sends."""
    return _proof(key, _CALLER, rank, listener_nonce, caller_nonce)


def listener_proof(key: bytes, rank: int, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    """The proof that the listener sends, to the caller of this rank alone."""
    return _proof(key, _LISTENER, rank, listener_nonce, caller_nonce)


def _proof(key: bytes, side: bytes, rank: int, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    said = GREETING + side + struct.pack("!I", rank) + listener_nonce + caller_nonce
    return hmac.digest(key, said, "sha256")

"""Mutual proof of a shared key, HMAC-SHA256 over fresh nonces of both sides. All messages have a fixed size.

    listener -> caller    greeting, nonce of the listener
    caller -> listener    rank of the caller, nonce of the caller, proof of the caller
    listener -> caller    proof of the listener; zeros where the proof of the caller is wrong

A proof includes the side that makes it, so the other side cannot send it back as its own. The listener sends its proof
only after the caller's proof is right.
"""

from __future__ import annotations

import hmac
import os
import struct

HANDSHAKE_SECONDS = 5.0  # for the whole handshake
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
    """Make a new key."""
    return os.urandom(KEY_BYTES)


def make_nonce() -> bytes:
    """Make random bytes for one handshake."""
    return os.urandom(NONCE_BYTES)


def derive_key(key: bytes, purpose: str) -> bytes:
    """Derive the key for one purpose: a listener with a key of its own cannot be mistaken for another."""
    return hmac.digest(key, purpose.encode(), "sha256")


def caller_proof(key: bytes, rank: int, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    """The proof that the caller sends."""
    return _proof(key, _CALLER, rank, listener_nonce, caller_nonce)


def listener_proof(key: bytes, rank: int, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    """The proof that the listener sends, to the caller of this rank alone."""
    return _proof(key, _LISTENER, rank, listener_nonce, caller_nonce)


def _proof(key: bytes, side: bytes, rank: int, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    message = GREETING + side + struct.pack("!I", rank) + listener_nonce + caller_nonce
    return hmac.digest(key, message, "sha256")

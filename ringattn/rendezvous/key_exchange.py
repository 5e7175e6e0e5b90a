"""Diffie-Hellman key exchange between two ranks over a channel that others may read.

The group is number 14 of RFC 3526, 2048 bits. It protects the key from a reader, but not from an attacker who alters
messages, who could alter the ranks' blocks as well.
"""

from __future__ import annotations

import hashlib
import os

_PRIME = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
    "EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F"
    "83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"
    "E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510"
    "15728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
_BYTES = 256


class KeyExchange:
    """One rank's side of the exchange.

    Attributes:
        public: The number to send to all other ranks, in hexadecimal digits.
    """

    def __init__(self) -> None:
        self._private = int.from_bytes(os.urandom(32), "big")
        self.public = f"{pow(2, self._private, _PRIME):x}"

    def key_with(self, public: str) -> bytes:
        """Return the key that this rank shares with the rank that has this `public`, 32 bytes.

        Raises:
            ValueError: `public` is no number of the group.
        """
        theirs = int(public, 16)
        if not 1 < theirs < _PRIME - 1:  # otherwise the key could be guessed
            raise ValueError(f"public: {public[:20]!r}, expected a number of the group")
        return hashlib.sha256(pow(theirs, self._private, _PRIME).to_bytes(_BYTES, "big")).digest()

"""TCP connections between processes that share a key: the launcher or the doctor and its ranks, and rank and rank.

`listener` accepts callers that prove that they know the key, `client` calls, `handshake` holds the proofs,
`key_exchange` gives two ranks a key, and `channel` carries messages afterwards. No key is ever sent, and nothing that a
stranger sends is parsed. What travels after the handshake is neither encrypted nor signed.

Standard library only, and nothing of ringattn: the process that every rank runs under imports it by path.
"""

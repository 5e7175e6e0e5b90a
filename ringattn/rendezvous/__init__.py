"""TCP connections between processes that share a key: the launcher or the doctor and its ranks, or two ranks.

`listener` accepts callers that prove that they know the key, `client` connects, `handshake` has the proofs,
`key_exchange` gives two ranks a key, `channel` carries messages afterwards, and `keepalive` ends lost connections. No
key is ever sent, and no data of a stranger are parsed. Messages after the handshake are neither encrypted nor signed.

Standard library only, and no other module of ringattn: the wrapper of every rank imports it by path.
"""

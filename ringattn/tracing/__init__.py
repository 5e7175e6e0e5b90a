"""Traces of rings: spans of computation, transfers and waits, as a file for Perfetto or as a picture.

`spans` records on a rank. `clocks` aligns the clocks of the ranks. `files` writes what `chrome` and `picture` make.
`ringattn.transport.trace_file` connects all of it with a ring.
"""

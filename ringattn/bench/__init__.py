"""Measurements of ``ringattn bench``.

`records` has the one form of all results; `report`, `comparison`, `growth` and `plot` show them. The other modules
measure: each checks an answer, times it, and returns a record.
"""

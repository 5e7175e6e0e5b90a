"""What ``ringattn doctor`` finds out: about each host, about each link, and what of it will not work.

`worker` runs on every rank and says what `facts`, `speeds`, `ways` and `links` find there; `run` starts the ranks and
reads what they say; `report` turns that into findings, and `table` into text. `breakeven`, `report` and `table` are
pure.
"""

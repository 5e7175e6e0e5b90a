"""Examination of a cluster for ``ringattn doctor``: each host, each link, and what will not work.

`worker` runs on every rank. It collects `host_info`, measures `compute_speed` and `link_speed`, tests `connectivity`,
and writes `records`. `runner` starts the ranks and parses their records. `diagnosis` turns these into findings, and
`output` into text or JSON. `breakeven`, `diagnosis` and `output` are pure.
"""

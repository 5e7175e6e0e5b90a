"""Run the benchmarks named on the command line, or all."""

from __future__ import annotations

import importlib
import sys

NAMES = ("imports", "decode", "memory", "ring", "links", "lm", "kernel", "work")

for name in sys.argv[1:] or NAMES:
    if name not in NAMES:
        raise SystemExit(f"benchmarks: {name!r}, expected one of {', '.join(NAMES)}")
    importlib.import_module(f".{name}", __package__).main()

"""Options of the planning benchmark, so that it can run in pieces."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import NETWORKS, main, report

parser = argparse.ArgumentParser(prog="benchmarks.planning")
parser.add_argument("--networks", default=",".join(NETWORKS), help="hosts:rate of each link, with commas between")
parser.add_argument("--json", type=Path, help="file to write: rates, predictions, measurements")
parser.add_argument("--show", type=Path, nargs="+", help="only print the table of such files")
options = parser.parse_args()
if options.show:
    report([json.loads(file.read_text()) for file in options.show])
else:
    main(options.networks.split(","), options.json)

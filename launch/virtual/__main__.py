"""``python -m launch.virtual``."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

from . import Cluster, clean, unavailable


def main() -> int:
    """Run a command beside a virtual cluster; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.virtual", description="A cluster on one Linux machine.")
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="hosts, 1 to 200 (default: 2)")
    parser.add_argument("--rate", help="of each host's link, either way, in tc's units: 1gbit (default: not limited)")
    parser.add_argument("--memory", help="of each host: 2G, 512M (default: not limited)")
    parser.add_argument("--cores", type=int, metavar="N", help="of each host, in turn (default: all of them for all)")
    parser.add_argument("--ring", action="store_true", help="a cable from each host to the next, which --rate is of")
    parser.add_argument("--clean", action="store_true", help="remove what ended runs have left, and do nothing else")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="to run, with RINGATTN_HOSTS in its environment")
    options = parser.parse_args()
    if why := unavailable():
        parser.error(why)
    if options.clean:
        clean()
        return 0
    if not options.command:
        parser.error("COMMAND: not given, expected a program and its arguments, after --")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with Cluster(options.hosts, options.rate, options.memory, options.cores, options.ring) as cluster:
            return cluster.run(options.command).returncode
    except (ValueError, subprocess.CalledProcessError) as error:
        told = (error.stderr or str(error)).strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        parser.error(told)
    except FileNotFoundError as error:
        parser.error(f"COMMAND: {error.filename}: not found")


if __name__ == "__main__":
    sys.exit(main())

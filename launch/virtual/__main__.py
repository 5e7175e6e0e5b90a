"""Command line ``python -m launch.virtual``."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

from . import Cluster, clean, unavailable


def main() -> int:
    """Run a command beside a virtual cluster. Return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.virtual", description="A cluster on one Linux machine.")
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="hosts, 1 to 200 (default: 2)")
    parser.add_argument("--rate", help="rate of each host's link, each way, in units of tc: 1gbit (default: no limit)")
    parser.add_argument("--memory", help="memory of each host: 2G, 512M (default: no limit)")
    parser.add_argument("--cores", type=int, metavar="N", help="cores of each host (default: all share all cores)")
    parser.add_argument("--ring", action="store_true", help="join each host to the next by a cable with this --rate")
    parser.add_argument("--clean", action="store_true", help="only remove the remains of runs that have ended")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="program, with RINGATTN_HOSTS in its environment")
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
        from_command = isinstance(error, subprocess.CalledProcessError) and error.stderr
        parser.error(error.stderr.strip() if from_command else str(error))
    except FileNotFoundError as error:
        parser.error(f"COMMAND: {error.filename}: not found")


if __name__ == "__main__":
    sys.exit(main())

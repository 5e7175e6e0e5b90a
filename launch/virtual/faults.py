"""Faults of a cluster, injected into a virtual one, and their outcomes.

sudo python -m launch.virtual.faults            # each once: the table of docs/faults.md
sudo python -m launch.virtual.faults 100        # a hundred at random, at random moments
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .cluster import Cluster
from .victim import IN_A_ROW, WRONG

HOSTS = 3
TIMEOUT = 5  # s without a heartbeat
ALLOWED = TIMEOUT + 5  # s until everything has ended
VICTIM = Path(__file__).with_name("victim.py")
ROOT = VICTIM.parents[2]

# Faults of rank 1 of 3, and the message that a rank or the launcher must print.
FAULTS = {
    "killed": r"rank 1 \(mac1\) was killed by SIGKILL",
    "stopped": r"rank 1 \(mac1\) gave no sign of life for 5 s; it was last heard of (in|after) (ring_att|all_red)",
    "cable pulled": r"rank 1 \(mac1\)(: the connection to it was lost| gave no sign of life for 5 s)",
    "no memory left": r"rank 1 \(mac1\) was killed by SIGKILL",
    "raises": r"rank 1 \(mac1\) failed .*ValueError: boom",
    "ends early": r"rank 1 \(mac1\) (left the ring|failed .*SystemExit)",
    "ends with a code": r"rank 1 \(mac1\) failed .*SystemExit: 5",
    "other arguments": r"ring_attention: scale differs between ranks: 0.25 on ranks 0 and 2, 0.5 on rank 1",
    "another version": r"ringattn differs between ranks: \S+ on ranks 0 and 2, 0.0.1 on rank 1",
    f"killed{IN_A_ROW}": r"rank 1 \(mac1\) was killed by SIGKILL",
    f"stopped{IN_A_ROW}": r"rank 1 \(mac1\) gave no sign of life for 5 s; it was last heard of (in|after) all_red",
    f"cable pulled{IN_A_ROW}": r"rank 1 \(mac1\)(: the connection to it was lost| gave no sign of life for 5 s)",
}
CODES = {"killed": 137, "no memory left": 137, "ends with a code": 5, f"killed{IN_A_ROW}": 137}
# Exit codes of the launcher; of other faults any but 0.
_SENT = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@dataclass(frozen=True)
class Outcome:
    """Outcome of a fault.

    Attributes:
        fault: Name of the fault.
        code: Exit code of the launcher; ``None`` if it did not end in time.
        seconds: Seconds from the fault until the launcher ended.
        cause: Printed message that names the cause; empty if there was none.
        wrong: Whether a rank had a wrong answer.
        left: Number of processes that were left on the hosts.
        output: Whole output.
    """

    fault: str
    code: int | None
    seconds: float
    cause: str
    wrong: bool
    left: int
    output: str

    @property
    def good(self) -> bool:
        """Whether the launcher ended in time with the right code, named the cause, and left no process."""
        failed = bool(self.code) and self.code == CODES.get(self.fault, self.code)
        return failed and bool(self.cause) and self.seconds < ALLOWED and not self.wrong and not self.left


def inflict(cluster: Cluster, fault: str, delay: float = 0.0) -> Outcome:
    """Start ranks on all hosts, and cause `fault` in rank 1 `delay` seconds after all ranks compute."""
    with tempfile.TemporaryDirectory(prefix="ringattn-faults-") as name:
        folder = Path(name)
        launcher = [sys.executable, "-m", "ringattn.cli", "launch", "--hosts", ",".join(cluster.addresses)]
        line = [*launcher, "--timeout", str(TIMEOUT), "--threads", "1", str(VICTIM), name, fault, "1"]
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
        with (folder / "output").open("w+") as output:
            process = subprocess.Popen(line, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            try:
                begin = _strike(cluster, process, folder, fault, delay)
                code = _wait(process, begin + ALLOWED + 10)
                seconds = time.monotonic() - begin
                while cluster.processes() and time.monotonic() - begin < ALLOWED:
                    time.sleep(0.1)
            finally:
                process.kill()
            left = len(cluster.processes())
            output.seek(0)
            text = output.read()
        _repair(cluster)
        found = re.search(FAULTS[fault] + r"[^\n)\"]*", text)
        wrong = code == WRONG or "WRONG ANSWER" in text
        return Outcome(fault, code, seconds, found[0] if found else "", wrong, left, text)


def _strike(cluster: Cluster, process: subprocess.Popen, folder: Path, fault: str, delay: float) -> float:
    """Cause the fault when all ranks are ready. Return the time."""
    end = time.monotonic() + 60
    ready = 0 if fault == "another version" else HOSTS
    while len(list(folder.glob("*.ready"))) < ready and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(delay)
    begin = time.monotonic()
    kind = fault.removesuffix(IN_A_ROW)
    if kind in _SENT:
        os.kill(int((folder / "1.pid").read_text()), _SENT[kind])
    elif kind == "cable pulled":
        cluster.unplug(1)
    else:
        (folder / "now").touch()
    return begin


def _wait(process: subprocess.Popen, end: float) -> int | None:
    try:
        return process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired:
        return None


def _repair(cluster: Cluster) -> None:
    """Prepare the cluster for the next fault."""
    for pid in cluster.processes():
        with suppress(ProcessLookupError):  # it ended by itself
            os.kill(pid, signal.SIGKILL)
    cluster.plug(1)


def make_cluster() -> Cluster:
    """Create the cluster for the faults."""
    return Cluster(HOSTS, rate="1gbit", memory="900M")


def main() -> int:
    """Try each fault once and print a table, or try as many random faults as the command line says."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else None
    chosen = list(FAULTS) if count is None else random.choices(list(FAULTS), k=count)
    with make_cluster() as cluster:
        outcomes = []
        for number, fault in enumerate(chosen, 1):
            outcomes.append(inflict(cluster, fault, 0.0 if count is None else random.uniform(0, 1.5)))
            if count is not None:
                outcome = outcomes[-1]
                failure = "" if outcome.good else f": FAILED: {outcome}"
                print(f"{number}: {fault}, {outcome.seconds:.1f} s{failure}", flush=True)
    good = sum(outcome.good for outcome in outcomes)
    if count is None:
        print(table(outcomes))
    print(f"{good} of {len(outcomes)} ended as expected", file=sys.stderr)
    return int(good < len(outcomes))


def table(outcomes: list[Outcome]) -> str:
    """Table in Markdown."""
    rows = [f"| {row.fault} | {row.code} | {row.seconds:.1f} s | `{row.cause}` |" for row in outcomes]
    return "\n".join(["| rank 1 of 3 | exit code | ended after | what is said |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())

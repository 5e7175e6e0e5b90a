"""The group of `mx.distributed` of a row: the environment from which MLX reads it, and the addresses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from spawn import spawn

from ringattn.cli.starting import Placement, prepare
from ringattn.errors import ArgumentError
from ringattn.transport.addresses import address_for_peers, interface_address
from ringattn.transport.mlx.row import row_environment

MEMBERS = [("10.0.0.3", 5001), ("10.0.0.4", 5002)]  # ranks 2 and 3
RDMA = json.dumps([[None if i == j else f"rdma{i}{j}" for j in range(4)] for i in range(4)])


@pytest.mark.parametrize(
    ("backend", "variables", "content"),
    [
        ("ring", {"MLX_RANK": "1", "MLX_HOSTFILE": ""}, [["10.0.0.3:5001"], ["10.0.0.4:5002"]]),
        (
            "nccl",
            {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.3", "NCCL_PORT": "5001"},
            [],
        ),
        (
            "jaccl",
            {"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.3:5001", "MLX_IBV_DEVICES": ""},
            [[None, "rdma23"], ["rdma32", None]],
        ),
    ],
)
def test_the_environment_of_a_row(backend: str, variables: dict, content: list) -> None:
    assert row_environment(backend, 1, MEMBERS, 2, RDMA) == (variables, content)


@pytest.mark.parametrize("rdma", [None, "", "[[null]]", "{}", "3"])
def test_unknown_rdma_devices(rdma: str | None) -> None:
    with pytest.raises(ArgumentError, match="the RDMA devices of ranks 2 to 3 are not known, expected a host file"):
        row_environment("jaccl", 1, MEMBERS, 2, rdma)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RINGATTN_ADDRESSES", "RINGATTN_INTERFACE", "RINGATTN_RDMA"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_addresses(no_launcher: pytest.MonkeyPatch) -> None:
    """Ranks on one host stay on its loopback; the launcher's addresses and interface count before all others."""
    assert address_for_peers(["a", "a"]) == "127.0.0.1"
    assert address_for_peers(["a", "b"]).count(".") == 3
    no_launcher.setenv("RINGATTN_ADDRESSES", "192.0.2.7,127.0.0.2,192.0.2.8")
    assert address_for_peers(["a", "b"]) == "127.0.0.2"
    no_launcher.setenv("RINGATTN_INTERFACE", "lo" if sys.platform == "linux" else "lo0")
    assert address_for_peers(["a", "b"]) == "127.0.0.1"


def test_unknown_interface() -> None:
    with pytest.raises(ArgumentError, match="--interface: none7 has no IPv4 address on"):
        interface_address("none7")


def test_the_launcher_tells_what_rows_need(no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hosts = [{"ssh": f"m{i}", "ips": [f"10.0.0.{i}"], "rdma": json.loads(RDMA)[i]} for i in range(4)]
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(hosts))
    ranks = prepare(Placement(hostfile=file, interface="en5"), ["true"], dry_run=True)
    found = {name: ranks.environment[f"RINGATTN_{name}"] for name in ("ADDRESSES", "INTERFACE", "RDMA")}
    assert found == {"ADDRESSES": "10.0.0.0,10.0.0.1,10.0.0.2,10.0.0.3", "INTERFACE": "en5", "RDMA": RDMA}
    file.write_text(json.dumps([{**hosts[0], "slots": 4}]))  # several ranks on a host share no device
    assert "RINGATTN_RDMA" not in prepare(Placement(hostfile=file), ["true"], dry_run=True).environment


FAULTS = """
import os, signal, sys, time
import mlx.core as mx
import ringattn as ra
ring = ra.init(timeout=3)
grid = ra.grid(ring, 2)
print(f"ready: {time.time()}", flush=True)
for i in range(1000000):
    ring.barrier() if i == 0 else None
    mx.eval(mx.distributed.all_sum(mx.ones(1000), group=grid.row))
    if i == 50 and ring.rank == 1:
        time.sleep(1.5)
        FAULT
    layout = ra.Layout.contiguous(8 * grid.rows, grid.rows)
    x = mx.ones((1, 1, 8, 16))
    ra.ring_attention(x, x, x, ring=grid.column, layout=layout)
"""


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 ({host}) gave no sign of life for 3 s"),
        ("raise ValueError('boom')", "rank 1 ({host}) failed after ring_attention: ValueError: boom"),
    ],
)
def test_a_fault_ends_a_grid(fault: str, told: str) -> None:
    """Ranks that wait in sums of a row, and in the rings of other columns, end and tell the cause."""
    result = spawn(4, ["-c", FAULTS.replace("FAULT", fault)], timeout=60)
    assert result.code not in (0, None), str(result)
    assert told.format(host=os.uname().nodename) in result.output, str(result)

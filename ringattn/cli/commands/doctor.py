"""``ringattn doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ...doctor.breakeven import AttentionModel
from ...doctor.diagnosis import diagnose
from ...doctor.output import as_json, as_text
from ...doctor.runner import DTYPES, Target, examine_cluster
from ..bench_options import parse_heads
from ..host_options import HOSTS, chosen_cluster, count_ranks, ranks_option, tensor_option, with_options


@click.command()
@with_options(ranks_option("Ranks.  [default: 2, or one for each slot of the hosts]"), *HOSTS, tensor_option)
@click.option(
    "--heads",
    default="32/8",
    show_default=True,
    callback=lambda context, option, given: parse_heads(given),
    help="Query / key-value heads of the model.",
)
@click.option("--head-dim", default=128, show_default=True, type=click.IntRange(1, 1024), help="Of the model.")
@click.option("--dtype", default="float16", show_default=True, type=click.Choice(list(DTYPES)), help="Of keys, values.")
@click.option("--causal/--full", default=True, show_default=True, help="The mask.")
@click.option(
    "--timeout",
    default=120.0,
    show_default=True,
    type=click.FloatRange(min=1),
    metavar="S",
    help="Seconds after which the examination ends and prints what it has found.",
)
@click.option("--json", "json_output", is_flag=True, help="Print one JSON object instead of tables.")
def doctor(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    interface: str | None,
    mpiexec: str | None,
    tensor: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: str,
    causal: bool,
    timeout: float,
    json_output: bool,
) -> None:
    """Examine every host and every link of a ring, and give advice for each problem.

    Per host: system, chip, memory, versions, MPI, and the speed of its matrix products and attention while all ranks
    compute. Per link, in the ring's order: latency, and bandwidth each way and both ways at once. For a model: the
    number of tokens per rank from which the transfers of its attention hide behind its compute.

    With --tensor, also the rows of ranks that share a model's weights: latency and bandwidth of their sums over
    mx.distributed, and whether the rows would have faster links if the list of hosts began with another host.

    A host that cannot be reached, or lacks something, is reported and left out. Before MPI starts, every host tries a
    TCP connection to every other. If one fails, it is reported, and no link is measured. The exit status is 1 if
    something will not work. What only costs speed is a warning.

    --json prints ok, size, ranks (rank, host, gflop_s, spread, memory_gb_s, mpi, done), links (ranks, latency_us,
    to_right_gb_s, to_left_gb_s, both_gb_s), rows (ranks, latency_us, gb_s), slowest_link, hop_gb_s (of every link while
    all are in use), break_even_tokens (per rank), model and findings (fatal, where, what, remedy); null stands for a
    value that is not known.
    """
    model = AttentionModel(*heads, head_dim, DTYPES[dtype], causal)
    cluster = chosen_cluster(hosts, hostfile, interface)
    size = count_ranks(2 if ranks is None and cluster is None else ranks, cluster)
    if size % tensor:
        raise click.UsageError(f"--tensor: {tensor}, expected a divisor of {size}, the number of ranks")
    click.echo(f"examining {size} rank{'s' * (size > 1)} ...", err=True)
    exam = examine_cluster(Target(size, cluster, interface, mpiexec, tensor), model, dtype, timeout)
    findings = diagnose(exam)
    click.echo(json.dumps(as_json(exam, findings, dtype), indent=1) if json_output else as_text(exam, findings, dtype))
    raise SystemExit(1 if any(finding.fatal for finding in findings) else 0)

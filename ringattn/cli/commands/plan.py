"""``ringattn plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...errors import ArgumentError
from ..bench_options import parse_heads
from ..counts import Count
from ..host_options import HOSTS, chosen_cluster, count_ranks, ranks_option, with_options
from ..output_files import problem_with

if TYPE_CHECKING:
    from ...planning import Cluster, Job, ModelShape, Prediction

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes
FOR_MEASURE = ("ranks", "hosts", "hostfile", "interface", "mpiexec", "timeout")
LINKS = ("link", "island", "outer_link", "row_link")
SLOW = (
    "Warning: the rate of products is that of float32 weights; a CPU multiplies others some 20 times more slowly. Plan "
    "and run with --dtype float32"
)

WHAT = (
    click.option("--model", metavar="PATH", help="A config.json, a folder, a repository, a GGUF file, or 'smollm2'."),
    click.option(
        "--heads",
        metavar="HQ/HKV",
        callback=lambda context, option, given: None if given is None else parse_heads(given),
        help="Instead of a model: query / key-value heads of attention alone.",
    ),
    click.option("--head-dim", default=128, show_default=True, type=click.IntRange(1, 1024), help="With --heads."),
    click.option("--layers", default=1, show_default=True, type=click.IntRange(min=1), help="With --heads."),
    click.option(
        "--dtype", type=click.Choice(list(DTYPES)), help="Of keys and values.  [default: the model's, or float16]"
    ),
    click.option(
        "--context", default="128K", show_default=True, type=Count(1, 1 << 30), help="Tokens of the prompt, such as 1M."
    ),
    click.option("--answer", default=256, show_default=True, type=Count(min=1), help="Tokens of the answer."),
    click.option(
        "--prefill-step-size",
        "chunk",
        type=Count(min=1),
        metavar="TOKENS",
        help="Tokens that a rank computes in one round of prefill.  [default: as ringattn generate]",
    ),
)

WHERE = (
    click.option(
        "--machine",
        "machines",
        multiple=True,
        metavar="[N*]CHIP[:MEM]",
        help="Machines, such as 4*m3-ultra:256G or 2*17.4/800:96G (TFLOP/s / GB/s : memory to use); repeatable.",
    ),
    click.option(
        "--link", default="10gbe", show_default=True, help="Link of neighbours: a name, or GB/s/us as 3.2/300."
    ),
    click.option("--island", type=click.IntRange(min=2), metavar="N", help="Neighbours in a group that --link joins."),
    click.option("--outer-link", help="Link between the groups of --island machines."),
    click.option("--row-link", help="Link of the sums over --tensor ranks.  [default: --link]"),
    click.option("--measure", is_flag=True, help="Measure this cluster instead; with -n or hosts, as ringattn doctor."),
    click.option("--growth", is_flag=True, help="Also the best for 1, 2, 4, ... of the machines."),
    click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(min=1), help="S, of --measure."),
)


@click.command()
@with_options(*WHAT, *WHERE, ranks_option("With --measure: ranks.  [default: 1, or the slots of the hosts]"), *HOSTS)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan here too.")
def plan(json_file: Path | None, growth: bool, answer: int, context: int, chunk: int | None, **options: Any) -> None:
    """Predict memory and time of a model on a cluster, and choose how its machines share the work.

    Compared are a ring (context parallel), rows that share the weights (tensor parallel), grids of both, a pipeline
    that streams a prompt in chunks, and rings of rings. Nothing is read but the model's configuration, and nothing
    runs but the measurements of --measure. ringattn generate and serve refuse a prompt that does not fit by the same
    model of memory.

        ringattn plan --model config.json --machine 4*m3-ultra:256G --link tb5-rdma --context 1M

    Chips: m1, m1-max, m1-ultra, m2, m2-max, m2-ultra, m3-max, m3-ultra, m4, m4-pro, m4-max, m5-max. Links: tb5-rdma,
    tb5-tcp, 25gbe, 10gbe, 2.5gbe, 1gbe.

    --json writes model, context, answer, prefill_step_size, machines, links, best and arrangements (arrangement,
    machines, ring, tensor, stages, groups, fits, memory_bytes, available_bytes, longest_context, first_token_s,
    token_s, hidden, bytes_per_prompt_token, strategy, weights, options). The exit status is 1 if nothing fits.
    """
    from ...planning import Job, best, predictions
    from ...planning.report import as_json, as_text

    _refuse_ignored()
    if json_file is not None and (problem := problem_with(json_file)):
        raise ArgumentError(f"--json: {json_file}: {problem}")
    shape = _shape(options)
    cluster, with_gpu = _cluster(options, shape)
    job = Job(context, answer, chunk, gpu=with_gpu)
    found = predictions(shape, cluster, job)
    if growth:
        found += _growth(shape, cluster, job)
    click.echo(as_text(shape, cluster, job, found))
    if json_file is not None:
        _write(json_file, as_json(shape, cluster, job, found))
    if best(found, answer) is None:
        raise SystemExit(1)


def _refuse_ignored() -> None:
    """Raise if the user gave an option that the others leave without effect."""
    context = click.get_current_context()
    given = {p.name: p.opts[0] for p in context.command.params if p.name and _is_given(context, p.name)}
    measured = "measure" in given
    for wrong, why, names in (
        ("heads" not in given, "only with --heads", ("head_dim", "layers")),
        (not measured, "only with --measure", FOR_MEASURE),
        (measured and "machines" not in given, "not with --measure", LINKS),
    ):
        if wrong and (found := [given[name] for name in names if name in given]):
            raise click.UsageError(f"{', '.join(found)}: {why}")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _shape(options: dict[str, Any]) -> ModelShape:
    from ...planning.shape import attention_shape

    if (options["model"] is None) == (options["heads"] is None):
        raise click.UsageError("--model, --heads: expected one of them")
    if options["model"] is None:
        heads, kv_heads = options["heads"]
        item = DTYPES[options["dtype"] or "float16"]
        return attention_shape(heads, kv_heads, options["head_dim"], item, options["layers"])
    from ...planning.describe import read_shape

    return read_shape(options["model"], options["dtype"])


def _cluster(options: dict[str, Any], shape: ModelShape) -> tuple[Cluster, bool]:
    """The cluster, and whether its ranks compute on GPUs."""
    from ...planning import Cluster, parse_link, parse_machines

    if options["measure"]:
        return _measured(options, shape)
    if not options["machines"]:
        raise click.UsageError("--machine is missing: expected such as 4*m3-ultra:256G, or --measure")
    machines = parse_machines(options["machines"])
    outer = options["outer_link"]
    island = options["island"] or 0
    if (outer is None) != (not island):
        raise click.UsageError("--island, --outer-link: expected both or neither")
    if island and len(machines) % island:
        raise click.UsageError(f"--island: {island}, expected a divisor of {len(machines)}, the number of machines")
    row = options["row_link"]
    return (
        Cluster(
            tuple(machines),
            parse_link("--link", options["link"]),
            island,
            None if outer is None else parse_link("--outer-link", outer),
            None if row is None else parse_link("--row-link", row),
        ),
        True,
    )


def _measured(options: dict[str, Any], shape: ModelShape) -> tuple[Cluster, bool]:
    from ...doctor.breakeven import AttentionModel
    from ...doctor.runner import Target, examine_cluster
    from ...planning.measured import has_gpu, measured_cluster

    if options["machines"]:
        raise click.UsageError("--machine: given with --measure, expected one of them")
    hosts = chosen_cluster(options["hosts"], options["hostfile"], options["interface"])
    size = count_ranks(1 if options["ranks"] is None and hosts is None else options["ranks"], hosts)
    dtype = options["dtype"] or "float16"
    model = AttentionModel(*shape.attention_heads, DTYPES[dtype], True)
    click.echo(f"measuring {size} rank{'s' * (size > 1)} ...", err=True)
    exam = examine_cluster(
        Target(size, hosts, options["interface"], options["mpiexec"]), model, dtype, options["timeout"]
    )
    if not has_gpu(exam) and options["model"] is not None and dtype != "float32":
        click.echo(SLOW, err=True)
    return measured_cluster(exam, dtype), has_gpu(exam)


def _growth(shape: ModelShape, cluster: Cluster, job: Job) -> list[Prediction]:
    """The best, or the one that is nearest to fit, for the powers of two below the number of machines."""
    from ...planning import best, predictions

    found = []
    count = 1
    while count < cluster.size:
        part = predictions(shape, cluster.first(count), job)
        found.append(best(part, job.answer) or max(part, key=lambda one: one.longest))
        count *= 2
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ArgumentError(f"--json: {file}: {error.strerror}") from None

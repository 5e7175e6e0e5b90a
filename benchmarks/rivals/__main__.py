"""Command line ``python -m benchmarks.rivals``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .results import FOLDER

if TYPE_CHECKING:
    from .job import Way
    from .roster import Rival


def main(line: Sequence[str] | None = None) -> None:
    """Run a comparison, or write the page from the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description="ringattn beside its rivals.")
    commands = parser.add_subparsers(dest="command", required=True)
    operator = commands.add_parser("operator", help="attention alone")
    operator.add_argument("--links", default="loopback,1gbit", help="loopback, and rates of virtual hosts' links")
    operator.add_argument("--rounds", type=int, default=2, help="rounds in which the fastest rivals take turns")
    operator.add_argument("--only", default="", help="regular expression for the problems, as they are printed")
    operator.add_argument("--rivals", default="", help="regular expression for the rivals, as 'ringmaster:ulysses'")
    operator.add_argument("--minutes", type=float, default=1e9, help="start no rival after them")
    operator.add_argument("--whole", action="store_true", help="all shapes at all lengths")
    operator.add_argument("--json", type=Path, default=FOLDER / "operator.json", help="file for the results")
    job = commands.add_parser("job", help="a whole language model on virtual hosts; needs root")
    job.add_argument("--rates", default="", help="some of the rates, with commas between")
    job.add_argument("--models", default="", help="regular expression for the models: smollm2, larger")
    job.add_argument(
        "--attention", default="", help="regular expression for the attention of the others: ringattn, mlx"
    )
    job.add_argument("--ways", default="", help="regular expression for the ways, as 'tensor mlx' or 'ring ringattn'")
    job.add_argument("--prompts", default="", help="some of the lengths, with commas between")
    job.add_argument("--samples", type=int, default=2, help="measurements of each piece")
    job.add_argument("--minutes", type=float, default=1e9, help="begin no piece (a prompt over a link) after them")
    job.add_argument("--whole", action="store_true", help="all lengths and both attentions at all rates")
    job.add_argument("--json", type=Path, default=FOLDER / "job.json", help="file for the results")
    page = commands.add_parser("page", help="write the results into docs/benchmarks.md, and draw them")
    page.add_argument("--folder", type=Path, default=FOLDER, help="folder of the results")
    page.add_argument("--gpu", type=Path, help="records of tools.nvidia.scaling and scaling_torch, in one JSON list")
    arguments = parser.parse_args(line)
    {"operator": _operator, "job": _job, "page": _page}[arguments.command](arguments)


def _operator(arguments: argparse.Namespace) -> None:
    from .operator import Operator, problems
    from .roster import ROSTER

    wanted = [one for one in problems(arguments.whole) if re.search(arguments.only, _name(one))]
    keep = re.compile(arguments.rivals)
    _require("--only", arguments.only, wanted, map(_name, problems(arguments.whole)))
    _require("--rivals", arguments.rivals, filter(keep.search, _names(ROSTER)), _names(ROSTER))
    links = arguments.links.split(",")
    measured = Operator(links, arguments.rounds, lambda rival: bool(keep.search(rival.name)), arguments.json)
    measured.run(wanted, arguments.minutes)


def _job(arguments: argparse.Namespace) -> None:
    from .job import WAYS, Job, pieces

    known = list(pieces(arguments.whole))
    rates = arguments.rates.split(",") if arguments.rates else sorted({one.rate for one in known})
    prompts = list(map(int, arguments.prompts.split(","))) if arguments.prompts else [one.prompt for one in known]
    for rate in rates:
        _require("--rates", rate, [one for one in known if one.rate == rate], (one.rate for one in known))
    kinds = [one for one in known if re.search(arguments.attention, one.attention)]
    _require("--attention", arguments.attention, kinds, (one.attention for one in known))
    models = [one for one in kinds if re.search(arguments.models, one.model)]
    _require("--models", arguments.models, models, (one.model for one in known))
    wanted = [one for one in models if one.rate in rates and one.prompt in prompts]
    _require("--prompts", arguments.prompts, wanted, (str(one.prompt) for one in known))
    keep = re.compile(arguments.ways)
    _require("--ways", arguments.ways, filter(keep.search, map(_way, WAYS)), map(_way, WAYS))
    Job(arguments.samples, lambda way: bool(keep.search(_way(way))), arguments.json).run(wanted, arguments.minutes)


def _page(arguments: argparse.Namespace) -> None:
    from .page import PICTURE, write
    from .picture import draw

    draw(arguments.folder, PICTURE)
    print(write(arguments.folder, arguments.gpu))


def _require(option: str, given: str, kept: Iterable, known: Iterable[str]) -> None:
    """End with an error if an option leaves nothing to run."""
    if not any(True for _ in kept):
        raise SystemExit(
            f"{option}: {given!r} leaves nothing to run, expected some of: {', '.join(dict.fromkeys(known))}"
        )


def _way(way: Way) -> str:
    return f"{way.name} {way.attention}"


def _names(rivals: Iterable[Rival]) -> list[str]:
    return [rival.name for rival in rivals]


def _name(problem) -> str:
    return f"{problem.label()} {'gradient' if problem.gradient else 'forward'}"


if __name__ == "__main__":
    main()

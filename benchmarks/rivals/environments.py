"""Virtual environments of the rivals, apart from the project's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("RINGATTN_RIVALS", Path.home() / ".cache" / "ringattn-rivals"))
PACKAGES = {
    "torch": (
        "numpy",
        "torch",
        "ring-attention-pytorch==0.5.20",
        "axolotl-ringmaster[transformers]==0.2.7",
    )
}


def python_of(environment: str) -> str:
    """Python of an environment, which is created where it is missing; this process's own for an empty name."""
    if not environment:
        return sys.executable
    folder = CACHE / environment
    python = folder / "bin" / "python"
    done = folder / "packages"
    wanted = "\n".join(PACKAGES[environment])
    if not done.exists() or done.read_text() != wanted:
        print(f"Installing {', '.join(PACKAGES[environment])} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES[environment]], check=True)
        done.write_text(wanted)
    return str(python)

"""Description of a host: its system, versions and kernel. Nothing here starts MPI."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.device import uses_gpu
from ..launcher.processes import available_cores
from ..lm.host_memory import usable_memory
from ..native import blas, sgemm, tf32
from ..reporting.machine import version
from . import nvidia

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class HostInfo:
    """Description of a host by one of its ranks. All values are JSON values.

    Attributes:
        host: Host name.
        system: Operating system, such as ``"macOS 26.2"`` or ``"Debian GNU/Linux 12 (bookworm), Linux 6.1.0"``.
        chip: Processor, such as ``"Apple M3 Ultra"``.
        memory: Memory in bytes.
        usable: Bytes of it that all ranks of the host may use together; see `ringattn.lm.host_memory`.
        cores: Number of CPU cores that this process may use.
        threads: Number of threads of a rank's kernel.
        python: Path of the Python interpreter.
        python_version: Version of the Python interpreter.
        ringattn, mlx, mpi4py, numpy: Versions, or ``"not installed"``.
        code: Short hash of ringattn's sources, since checkouts of one version may differ.
        metal: Whether MLX has Metal here.
        gpu: Name of the GPU, with its software if it is an NVIDIA GPU; ``None`` where MLX computes on the CPU.
        float32: Precision of MLX's float32 products: ``"full"`` or ``"TF32"``. See `ringattn.native.tf32`.
        kernel: Backend that `ringattn.attention` takes by default.
        load: Load average of the last minute for each core of the host.
        blas_advice: Advice for slow matrix products of MLX; ``None`` where NumPy's BLAS does them already, and on
            systems other than Linux. See `ringattn.native.sgemm`.
    """

    host: str
    system: str
    chip: str
    memory: int
    cores: int
    threads: int
    python: str
    python_version: str
    ringattn: str
    mlx: str
    mpi4py: str
    numpy: str
    code: str
    metal: bool
    gpu: str | None
    float32: str
    kernel: str
    load: float
    blas_advice: str | None
    usable: int = 0


def collect() -> HostInfo:
    """Describe this host."""
    import mlx.core as mx

    from ..backends import select

    return HostInfo(
        host=platform.node(),
        system=_system(),
        chip=_chip(),
        memory=_memory(),
        cores=available_cores(),
        threads=blas.threads(),
        python=sys.executable,
        python_version=platform.python_version(),
        ringattn=version("ringattn"),
        mlx=version("mlx"),
        mpi4py=version("mpi4py"),
        numpy=version("numpy"),
        code=fingerprint(PACKAGE),
        metal=mx.metal.is_available(),
        gpu=_gpu(),
        float32="TF32" if tf32.in_force() else "full",
        kernel=select(None).name,
        load=os.getloadavg()[0] / (os.cpu_count() or 1),
        blas_advice=_blas_advice(),
        usable=usable_memory(),
    )


def _gpu() -> str | None:
    import mlx.core as mx

    if not uses_gpu():
        return None
    name = str(mx.device_info().get("device_name", "GPU"))
    return f"{name} ({nvidia.description()})" if mx.cuda.is_available() else name


def _blas_advice() -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    if chosen := sgemm.chosen():
        return f"unset {' and '.join(chosen)}, so that NumPy's BLAS takes the place of MLX's"
    return sgemm.advice()


def fingerprint(folder: Path) -> str:
    """Hash of the names and contents of all Python and Metal files in `folder`.

    C files do not count: a checkout has them, an installed package has not.
    """
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".metal", ".cu", ".cuh")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:12]


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}"


def _chip() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _memory() -> int:
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""

"""mpiexec: find it, distinguish MPICH from Open MPI, and write their command lines."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import LaunchError
from ..native import tf32
from .rank_wrapper import THREADS

if TYPE_CHECKING:
    from .hostfile import Host

Flavour = Literal["MPICH", "Open MPI"]
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")  # ask for no password: the user may be away
_NAMES = ("mpiexec", "mpiexec.hydra", "mpiexec.mpich", "mpiexec.openmpi")
_WRAPPER = Path(__file__).with_name("rank_wrapper.py")


@dataclass(frozen=True)
class Mpiexec:
    """An mpiexec and the MPI it belongs to."""

    path: str
    flavour: Flavour


def find_mpiexec(path: str | None = None) -> Mpiexec:
    """Find the mpiexec at `path`, or else the first one of the MPI that mpi4py loads, or else the first one at all.

    The search covers the folder beside the library in ``MPI4PY_LIBMPI``, the folder of this Python (where the PyPI
    wheels put it), then PATH. Two MPIs may share a folder and differ in the programs' names.

    Raises:
        LaunchError: No mpiexec is found, or it is neither MPICH's nor Open MPI's.
    """
    if path is not None:
        found = shutil.which(path)
        if found is None:
            raise LaunchError(f"--mpiexec: {path!r} is not a program that can be run", 127)
        return Mpiexec(os.path.abspath(found), _flavour(found))
    candidates = _find_candidates()
    if not candidates:
        raise LaunchError("no mpiexec found, beside this Python or on PATH: pip install 'ringattn[mpi]'")
    library = library_flavour()
    fitting = (one for one in candidates if library is not None and _may_be(one, library))
    found = next(fitting, candidates[0])
    return Mpiexec(os.path.abspath(found), _flavour(found))


def _find_candidates() -> list[str]:
    """Find every mpiexec of this machine, the preferred ones first."""
    library = os.environ.get("MPI4PY_LIBMPI", "")
    beside = os.path.realpath(os.path.join(library, "../../bin")) if os.path.isabs(library) else ""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    folders = filter(None, (beside, os.path.dirname(sys.executable), sysconfig.get_path("scripts"), *path))
    found = (shutil.which(name, path=folder) for folder in folders for name in _NAMES)
    return list(dict.fromkeys(filter(None, found)))


def _may_be(path: str, flavour: Flavour) -> bool:
    try:
        return _flavour(path) == flavour
    except LaunchError:
        return False


@functools.lru_cache
def _flavour(path: str) -> Flavour:
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{path} --version does not answer: {error}") from None
    return parse_flavour(path, shown.stdout + shown.stderr)


def parse_flavour(path: str, version: str) -> Flavour:
    """Find the MPI that an mpiexec belongs to, from the output of ``mpiexec --version``.

    Raises:
        LaunchError: The MPI is neither MPICH (or a relative that uses its launcher, Hydra) nor Open MPI.
    """
    if "HYDRA" in version.upper() or "Intel(R) MPI" in version:
        return "MPICH"
    if "Open MPI" in version or "OpenRTE" in version or "PRRTE" in version:
        return "Open MPI"
    first_line = version.strip().partition("\n")[0] or "nothing"
    raise LaunchError(f"{path} is neither MPICH's nor Open MPI's mpiexec; --version prints {first_line[:80]!r}")


def library_flavour(environment: Mapping[str, str] | None = None, prefix: str | None = None) -> Flavour | None:
    """Find the MPI whose library mpi4py will load, or ``None`` if the file names do not show it.

    The search is mpi4py's own (its variables, then the environment's ``lib``), by file names alone: loading the
    library, as mpi4py does, would take longer than all other work of the launcher.
    """
    environment = os.environ if environment is None else environment
    abi = environment.get("MPI4PY_MPIABI", "").lower().translate({ord(c): None for c in " -_"})
    library = environment.get("MPI4PY_LIBMPI", "")
    if abi:
        return {"mpich": "MPICH", "impi": "MPICH", "openmpi": "Open MPI"}.get(abi)  # type: ignore[return-value]
    names = [os.path.realpath(library)] if library else os.listdir(_lib(prefix)) if _lib(prefix).is_dir() else []
    numbers = {number for name in names for number in (12, 40) if _is_libmpi(os.path.basename(name), number)}
    return None if not numbers else "MPICH" if 12 in numbers else "Open MPI"  # mpi4py tries 12 first, too


def _lib(prefix: str | None) -> Path:
    return Path(sys.prefix if prefix is None else prefix, "lib")


def _is_libmpi(name: str, number: int) -> bool:
    return name.startswith((f"libmpi.so.{number}", f"libmpi.{number}."))


def mismatch(mpiexec: Mpiexec) -> str | None:
    """Return a warning if mpi4py will load another MPI than this mpiexec's: every rank would then be alone."""
    library = library_flavour()
    if library is None or library == mpiexec.flavour:
        return None
    return (
        f"{mpiexec.path} belongs to {mpiexec.flavour}, but mpi4py here loads {library}: "
        f"every rank will see itself alone; keep one of them per virtual environment, or give --mpiexec"
    )


def build_command(
    mpiexec: Mpiexec,
    ranks: int,
    command: Sequence[str],
    *,
    hosts: Sequence[Host] = (),
    home: str = "127.0.0.1",
    interface: str | None = None,
    variables: Iterable[str] = (),
    root: bool | None = None,
) -> list[str]:
    """Build the command line that runs `command` on `ranks` ranks, each under its wrapper.

    Threads may run on all cores (no binding), and there may be more ranks than cores.

    Args:
        mpiexec: From `find_mpiexec`.
        ranks: The number of ranks, at least 1.
        command: The program and its arguments. One that ends in ``.py``, and ``ringattn``, run under this Python.
        hosts: The hosts of the ranks, filled one after the other; none: this machine.
        home: The address of this machine at which the hosts reach it.
        interface: The network interface for the ranks' messages (Open MPI; MPICH reads it from the environment). The
            launcher's messages do not use it, because it may have another name on this machine.
        variables: Names of the environment's variables to pass to other hosts (Open MPI; MPICH passes all).
        root: Whether the user is root, which Open MPI allows only with an option. Default: ask the system.
    """
    line = [mpiexec.path]
    slots = ",".join(f"{host.ssh}:{host.slots}" for host in hosts)
    if mpiexec.flavour == "Open MPI":
        root = os.geteuid() == 0 if root is None else root
        line += ["--allow-run-as-root"] if root else []
        line += ["--map-by", "slot:OVERSUBSCRIBE" if hosts else ":OVERSUBSCRIBE", "--bind-to", "none"]
        if hosts:
            line += ["--host", slots, "--prefix", sys.prefix, "--wdir", "/"]
            line += [part for name in sorted(set(variables)) for part in ("-x", name)]
        line += ["--mca", "btl_tcp_if_include", interface] if interface else []
    else:
        line += ["-launcher", "ssh", "-hosts", slots, "-wdir", "/", "-localhost", home] if hosts else []
    line += ["-n", str(ranks), sys.executable, "-IS", str(_WRAPPER), "--"]
    return line + [_escape(argument) for argument in (*_under_this_python(command[0]), *command[1:])]


def _under_this_python(program: str) -> list[str]:
    """The command for `program` on every host: scripts and ringattn run under the Python at the path of this one."""
    if program == "ringattn":
        return [sys.executable, "-m", "ringattn.cli"]
    return [sys.executable, program] if program.endswith(".py") else [program]


def _escape(argument: str) -> str:
    """Escape a bare ``:``, which starts another program for mpiexec; `rank_wrapper.unescape` undoes this."""
    return "\\" + argument if argument.lstrip("\\") == ":" else argument


def check_command(command: Sequence[str]) -> None:
    """Raise `LaunchError` if the program does not exist: one line instead of one traceback per rank."""
    program = command[0]
    if program.endswith(".py"):
        if not os.path.isfile(program):
            raise LaunchError(f"COMMAND: there is no file {program!r}", 127)
    elif program != "ringattn" and shutil.which(program) is None:
        there = os.sep in program and os.path.exists(program)
        problem = f"{program!r} cannot be run" if there else f"program {program!r} not found"
        raise LaunchError(f"COMMAND: {problem}", 126 if there else 127)


def build_environment(
    *,
    threads: int | None = None,
    timeout: float | None = None,
    interface: str | None = None,
    remote: bool = False,
    prefix: bool = False,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Build the environment of the ranks: `base` (default: that of this process) and the launcher's variables.

    Each rank's wrapper sets the threads of its host if they are not set.

    Args:
        threads: Threads per rank. The user's own settings for BLAS and OpenMP stay.
        timeout: Seconds without a heartbeat after which a peer counts as dead.
        interface: The network interface of those hosts for messages.
        remote: Whether ranks run on other hosts.
        prefix: Print the rank before each line of its output.
        base: The environment to start from.
    """
    environment = dict(os.environ if base is None else base)
    if threads is not None:
        for name in THREADS:
            environment.setdefault(name, str(threads))
        environment["RINGATTN_THREADS"] = str(threads)
    if timeout is not None:
        environment["RINGATTN_TIMEOUT"] = f"{timeout:g}"
    if remote:
        _choose_network(environment, interface)
        environment["RINGATTN_LAUNCH_CWD"] = os.getcwd()
        environment.setdefault("HYDRA_LAUNCHER_EXTRA_ARGS", " ".join(SSH_OPTIONS))
        environment.setdefault("PRTE_MCA_plm_ssh_agent", " ".join(["ssh", *SSH_OPTIONS]))
    if prefix:
        environment["RINGATTN_LAUNCH_PREFIX"] = "1"
    elif sys.stderr.isatty():
        environment["RINGATTN_TERMINAL"] = "1"  # a user sees what the ranks write
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.setdefault(tf32.VARIABLE, "0")
    return environment | {"RINGATTN_LAUNCH": "1"}


def _choose_network(environment: dict[str, str], interface: str | None) -> None:
    """Make MPICH use TCP unless the user has chosen another network, and `interface`.

    Its wheel for Linux prefers UCX, which the wheel for macOS lacks: the two could not communicate. And UCX spreads its
    messages over all interfaces, whichever address names a host.
    """
    network = environment.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
    if network == "ofi":
        environment.setdefault("FI_PROVIDER", "tcp")
    if interface is not None:
        environment["UCX_NET_DEVICES" if network == "ucx" else "FI_TCP_IFACE"] = interface

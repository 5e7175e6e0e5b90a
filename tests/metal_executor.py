"""Who runs the Metal kernels in the tests: MLX on an Apple GPU where there is one, else the host runtime.

``RINGATTN_TEST_METAL`` is ``gpu`` or ``host`` and chooses. On a GPU, tests whose features do not work there are
skipped (see ``tools.ci.metal_canary``), and so are those that need the host runtime.
"""

from __future__ import annotations

import os
import re
from functools import cache

import mlx.core as mx

from ringattn.metal import launch, set_executor
from tools.ci import metal_canary
from tools.hostmetal import Runtime

SWITCH = "RINGATTN_TEST_METAL"
OTHER_DTYPES = re.compile(r"\bfloat(16|32)\b")
KERNEL_FEATURES = ("simdgroup_matrix", "simd_sum", "simd_shuffle")  # every kernel uses them


def on_gpu(environment: dict[str, str] | None = None) -> bool:
    """Whether an Apple GPU runs the kernels.

    Raises:
        ValueError: If the switch has another value, or asks for a GPU that is not there.
    """
    gpu = mx.metal.is_available()
    chosen = (os.environ if environment is None else environment).get(SWITCH) or ("gpu" if gpu else "host")
    if chosen not in ("gpu", "host"):
        raise ValueError(f"{SWITCH}: {chosen!r}, expected gpu or host")
    if chosen == "gpu" and not gpu:
        raise ValueError(f"{SWITCH}: gpu, but there is no Apple GPU here, expected host")
    return chosen == "gpu"


def usual_executor(checks: bool = True) -> launch.Executor:
    """The function that runs the kernels of the tests; `checks` is of the host runtime."""
    return launch.launcher.gpu if on_gpu() else Runtime(checks=checks)


def restore_executor() -> None:
    """Have the usual executor run the kernels."""
    set_executor(None if on_gpu() else Runtime())


@cache
def missing() -> dict[str, str]:
    """The features that do not work on this GPU, with what is wrong."""
    return metal_canary.missing()


def description() -> str:
    """Who runs the kernels, in words."""
    if not on_gpu():
        return "tools.hostmetal"
    return f"{mx.device_info()['device_name']}, missing features: {', '.join(missing()) or 'none'}"


def reason_to_skip(test: str, needs_host_runtime: bool) -> str | None:
    """Why a test cannot run on this GPU; ``None`` where it can.

    Args:
        test: Its id; one that names no other dtype also uses bfloat16.
        needs_host_runtime: Whether it is marked so.
    """
    if needs_host_runtime:
        return "needs the host runtime of the Metal kernels"
    if "metal" not in test:
        return None
    used = KERNEL_FEATURES if OTHER_DTYPES.search(test) else (*KERNEL_FEATURES, "bfloat")
    return next((f"{name} does not work on this GPU: {missing()[name]}" for name in used if name in missing()), None)

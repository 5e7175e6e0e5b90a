"""The kernel that merges the states of several runs of keys."""

from __future__ import annotations

from ..merge import State
from . import source
from .call import KernelCall
from .forward import ending_outputs, ending_switches
from .problem import Ending

THREADS = 64


def combine_call(states: State, ending: Ending | None) -> KernelCall:
    """The call of `combine.metal` for the states of several runs, whose arrays have a first axis `runs`."""
    _, batch, heads, q_len, value_dim = states.acc.shape
    inputs = {"acc_in": states.acc, "m_in": states.m, "l_in": states.l}
    if ending is not None and ending.sinks is not None:
        inputs["sinks"] = ending.sinks
    outputs = ending_outputs(ending, (batch, heads, q_len), value_dim)
    switches = ending_switches(ending)
    return KernelCall(
        name="_".join(["ringattn_combine", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(inputs),
        source=source.body("combine"),
        header=source.header(tuple(switches.items())),
        inputs=list(inputs.values()),
        template=[("Out", outputs["output_dtypes"][0]), ("DV", value_dim)],
        grid=(value_dim, batch * heads * q_len, 1),
        threadgroup=(min(THREADS, value_dim), 1, 1),
        compile_options={"math_mode": "safe"},
        **outputs,
    )

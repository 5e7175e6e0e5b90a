"""Counters of a kernel's operations and memory accesses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields


@dataclass
class Counters:
    """Counts of one launch, or sums over several launches.

    Attributes:
        matmuls: 8 x 8 x 8 matrix multiplications, counted once for a simdgroup.
        tensor_ops: Tensor operations, counted once for a simdgroup.
        exp2: Calls by threads, like `exp`, `log` (any base) and `tanh`.
        barriers: Barriers of a whole threadgroup.
        simdgroup_barriers: Barriers of a whole simdgroup.
        shuffles: Shuffles, ballots and reductions of a whole simdgroup.
        groups: Threadgroups that ran.
        threadgroup_bytes: Threadgroup memory of one threadgroup; the largest where counts are summed.
        threadgroup_read: Bytes of it that threads read; `threadgroup_written` are the bytes written.
        bank_conflicts: Estimated extra cycles of simdgroups that access one bank of threadgroup memory at a time.
        constant_read: Bytes read from constants: small inputs, shapes, strides, tables.
        device_read: Bytes that threads read, by buffer; `device_written` are the bytes written.
    """

    matmuls: int = 0
    tensor_ops: int = 0
    exp2: int = 0
    exp: int = 0
    log: int = 0
    tanh: int = 0
    barriers: int = 0
    simdgroup_barriers: int = 0
    shuffles: int = 0
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    threadgroup_bytes: int = 0
    bank_conflicts: int = 0
    groups: int = 0
    constant_read: int = 0
    device_read: dict[str, int] = field(default_factory=dict)
    device_written: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counters) -> Counters:
        total = Counters()
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if isinstance(a, dict):
                value = {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
            else:
                value = max(a, b) if f.name == "threadgroup_bytes" else a + b
            setattr(total, f.name, value)
        return total

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        return asdict(self)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.as_dict().items() if value)

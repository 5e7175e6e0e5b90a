"""The text that MLX compiles for a custom kernel, and the entry that the core calls."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ringattn.metal.launch import KernelCall

CONSTANT_BELOW = 8  # elements: smaller inputs are in constant memory

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}

# Metal's attributes that MLX knows: the type, and the field of the core with the value
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", "p->dispatch_simdgroups * 8"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "p->dispatch_simdgroups"),
    "dispatch_threads_per_threadgroup": ("uint3", "HOSTMETAL_UINT3(p->dispatch_threads_per_threadgroup)"),
    "grid_origin": ("uint3", "uint3{0, 0, 0}"),
    "grid_size": ("uint3", "HOSTMETAL_UINT3(p->threads_per_grid)"),
    "quadgroup_index_in_threadgroup": ("uint", "p->index / 4"),
    "quadgroups_per_threadgroup": ("uint", "p->simdgroups * 8"),
    "simdgroup_index_in_threadgroup": ("uint", "p->simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "p->simdgroups"),
    "thread_execution_width": ("uint", "32"),
    "thread_index_in_quadgroup": ("uint", "p->lane % 4"),
    "thread_index_in_simdgroup": ("uint", "p->lane"),
    "thread_index_in_threadgroup": ("uint", "p->index"),
    "thread_position_in_grid": ("uint3", "HOSTMETAL_UINT3(p->in_grid)"),
    "thread_position_in_threadgroup": ("uint3", "HOSTMETAL_UINT3(p->in_threadgroup)"),
    "threadgroup_position_in_grid": ("uint3", "HOSTMETAL_UINT3(p->threadgroup_position)"),
    "threadgroups_per_grid": ("uint3", "HOSTMETAL_UINT3(p->threadgroups_per_grid)"),
    "threads_per_grid": ("uint3", "HOSTMETAL_UINT3(p->threads_per_grid)"),
    "threads_per_simdgroup": ("uint", "32"),
    "threads_per_threadgroup": ("uint3", "HOSTMETAL_UINT3(p->threads_per_threadgroup)"),
}


@dataclass(frozen=True)
class Parameter:
    """A buffer among the kernel's parameters.

    Attributes:
        name: The name in the kernel's signature.
        space: ``"constant"`` or ``"device"``.
        type: The element's type in Metal.
        reference: Whether the parameter is a reference to one element.
        role: ``"input"``, ``"output"``, ``"shape"``, ``"strides"`` or ``"ndim"``.
        of: The input that the parameter belongs to, or its own name.
    """

    name: str
    space: str
    type: str
    reference: bool
    role: str
    of: str

    def declaration(self) -> str:
        const = "" if self.role == "output" else "const "
        space = f"{const}{self.space} " if self.role in ("input", "output") else "const constant "
        return f"  {space}{self.type}{'&' if self.reference else '*'} {self.name}"

    def argument(self, index: int) -> str:
        const = "" if self.role == "output" else "const "
        pointer = f"HOSTMETAL_POINTER({const}{self.space} {self.type}, a[{index}])"
        return f"*{pointer}" if self.reference else pointer


def parameters(call: KernelCall) -> list[Parameter]:
    """List the kernel's buffers in the order of its signature. Like MLX, search the source for their names."""
    found = []
    for name, array in zip(call.input_names, call.inputs):
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        found.append(Parameter(name, space, TYPES[array.dtype], array.ndim == 0, "input", name))
        for role, type_ in (("shape", "int"), ("strides", "int64_t"), ("ndim", "int")) if array.ndim else ():
            if f"{name}_{role}" in call.source:
                found.append(Parameter(f"{name}_{role}", "constant", type_, role == "ndim", role, name))
    for name, dtype in zip(call.output_names, call.output_dtypes):
        found.append(Parameter(name, "device", TYPES[dtype], False, "output", name))
    return found


def attributes(call: KernelCall) -> list[str]:
    return [name for name in ATTRIBUTES if name in call.source]


def template_value(value: mx.Dtype | int | bool) -> str:
    return TYPES[value] if isinstance(value, mx.Dtype) else str(int(value))


def template_type(value: mx.Dtype | int | bool) -> str:
    return "typename" if isinstance(value, mx.Dtype) else "bool" if isinstance(value, bool) else "int"


def kernel_name(call: KernelCall) -> str:
    """Name a kernel as MLX does: a name always means one source."""
    parts = [f"custom_kernel_{call.name}"]
    parts += [template_value(value) for _, value in call.template]
    for array in call.inputs:
        mark = "s" if array.ndim == 0 else "c" if array.size < CONSTANT_BELOW else ""
        parts.append(TYPES[array.dtype] + mark)
    parts += [TYPES[dtype] for dtype in call.output_dtypes]
    return "_".join(parts).replace("-", "m")


def kernel_text(call: KernelCall) -> str:
    """Join header, template line, signature, source and instantiation."""
    name = kernel_name(call)
    lines = [p.declaration() + f" [[buffer({i})]]" for i, p in enumerate(parameters(call))]
    lines += [f"  {ATTRIBUTES[a][0]} {a} [[{a}]]" for a in attributes(call)]
    text = call.header
    if call.template:
        text += f"template <{', '.join(f'{template_type(v)} {n}' for n, v in call.template)}>\n"
    text += f"[[kernel]] void {name}(\n" + ",\n".join(lines) + ") {\n" + call.source + "\n}\n"
    if call.template:
        instance = instance_name(call)
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return text


def instance_name(call: KernelCall) -> str:
    values = ", ".join(template_value(value) for _, value in call.template)
    return f"{kernel_name(call)}<{values}>" if call.template else kernel_name(call)


def entry_text(instance: str, arguments: list[str]) -> str:
    """Write a C function for the core, with the addresses of the buffers in `a` and the thread's position in `p`."""
    body = ",\n    ".join(arguments)
    return (
        "HOSTMETAL_ENTRY void hostmetal_kernel(const ulong* a, const ThreadPosition* p) {\n"
        f"  {instance}(\n    {body});\n}}\n"
    )


def call_entry(call: KernelCall) -> str:
    arguments = [p.argument(i) for i, p in enumerate(parameters(call))]
    return entry_text(instance_name(call), arguments + [ATTRIBUTES[a][1] for a in attributes(call)])

"""What an exported program contains and what of it cannot be imported, for `inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hawq_tvm import arith
from hawq_tvm.trust import trusted

from ..common.values import Constant
from .program import QUANTIZATION, Call, Program, Ref
from .reader import read_program

# What a dequantized constant is to the operator that reads it, by the name of its argument.
ROLES = {"weight": "weight", "bias": "bias", "mat2": "weight", "other": "constant"}


def describe_exported(source: Any) -> dict[str, Any]:
    """A JSON-ready description: inputs, outputs, operator counts, every quantized tensor's bits and grain."""
    program = read_program(source)
    return {
        "format": "PyTorch exported program",
        "read_with": f"torch {program.torch_version}{', trusted: what the file holds may have run' if trusted() else ''}",
        "inputs": [{"name": i.name, "dtype": i.kind, "shape": i.dims} for i in program.inputs],
        "outputs": [{"name": name} for name, _ in program.outputs],
        "nodes": len(program.calls),
        "operators": dict(sorted(Counter(c.op for c in program.calls).items())),
        "parameters": sum(int(program.constants[name].size) for name in _read(program)),
        "quantized": _quantized(program),
    }


def _read(program: Program) -> set[str]:
    """The constants that something reads: PT2E leaves the float weights in the file."""
    return {r.name for c in program.calls for r in c.refs()} & set(program.constants)


def _quantized(program: Program) -> list[dict[str, Any]]:
    readers = {v.name: role for c in reversed(program.calls) for role, v in c.arguments.items() if isinstance(v, Ref)}
    found = []
    for call in program.calls:
        verb = call.op.removeprefix(QUANTIZATION)
        if call.op == verb or not verb.startswith(("quantize_", "dequantize_")):
            continue
        role = "output" if verb.startswith("quantize_") else "input"
        if any(r.name in program.constants for r in call.refs()[:1]):
            role = ROLES.get(readers.get(call.name, ""), "constant")
        found.append({"name": call.layer, "op": verb, "role": role, **_format(call, program)})
    return found


def _format(call: Call, program: Program) -> dict[str, Any]:
    arguments = call.arguments
    kind = str(arguments.get("dtype"))
    low, high = arguments.get("quant_min"), arguments.get("quant_max")
    narrow = isinstance(low, int) and isinstance(high, int)
    bits = arith.QType(low, high, kind).bits if narrow and low is not None and high is not None else None
    scale = _stored(arguments.get("scale", arguments.get("scales")), program)
    zero = _stored(arguments.get("zero_point", arguments.get("zero_points")), program)
    grain = "computed at run time" if scale is None else "per tensor" if "per_tensor" in call.op else f"per channel ({scale.array.size})"
    return {
        "type": kind if bits is None or (low, high) == arith.RANGES.get(kind) else f"{kind} of {bits} bits ({low} to {high})",
        "bits": bits, "granularity": grain, "symmetric": None if zero is None else not zero.array.any(),
    }  # fmt: skip


def _stored(value: Any, program: Program) -> Constant | None:
    import numpy as np

    if isinstance(value, Ref):
        return Constant(program.constants[value.name]) if value.name in program.constants else None
    return Constant(np.asarray(0 if value is None else value))

"""What a package says about itself: interface, target, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from hawq_tvm.compiler import compilers
from hawq_tvm.compiler.native import toolchain
from hawq_tvm.compiler.pipeline import Compiled
from hawq_tvm.core import cut, ops, stages, work
from hawq_tvm.core.version import __version__
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.targets import target as targets


def describe(compiled: Compiled, name: str) -> dict[str, Any]:
    """The manifest of a compiled model, without the hashes of its files."""
    target, found = compiled.target, cut.of_main(compiled.packed["main"])
    return {
        "name": name,
        "producer": {
            "hawq_tvm": __version__,
            "tvm": str(tvm.__version__),
            "tvm_ffi": str(tvm_ffi.__version__),
            "llvm": int(tvm.target.codegen.llvm_version_major()),
            **compilers.compiler_versions(target),
        },
        "target": {
            **targets.describe(target),
            "architecture": targets.architecture(target),
            "cpu_features": targets.required_features(target),
            "cpuinfo_flags": targets.required_flags(target),
        },
        "c_interface": None if cuda.is_cuda(target) else toolchain.ABI_VERSION,
        "inputs": _interface(compiled.packed, "inputs"),
        "outputs": _interface(compiled.packed, "outputs"),
        "float_tail": sorted(stages.float_tail(compiled.packed["main"])),
        "nonlinear": str((compiled.packed["main"].attrs or {}).get("hawq.nonlinear", "real")),
        **({"cut": found.fields()} if found is not None else {}),
        "constants_bytes": _constants_bytes(compiled.tir),
        "products": work.products(compiled.packed),
        "graph_sha256": str(compiled.packed["main"].attrs["hawq.graph_sha256"]),
    }


def fits(packed: tvm.IRModule, manifest: Mapping[str, Any]) -> bool:
    """Whether a stored graph (PACKED stage) is the one that a manifest describes."""
    found = {
        "inputs": _interface(packed, "inputs"),
        "outputs": _interface(packed, "outputs"),
        "graph_sha256": str(packed["main"].attrs["hawq.graph_sha256"]),
    }
    return all(manifest[key] == value for key, value in found.items())


def _constants_bytes(tir: tvm.IRModule) -> int:
    return sum(
        ops.const_value(a).nbytes
        for b in stages.bindings(tir["main"])
        if isinstance(b.value, relax.Call) and ops.op_name(b.value) == "relax.call_tir"
        for a in b.value.args[1].fields
        if ops.is_const(a)
    )


def _interface(packed: tvm.IRModule, side: str) -> list[dict[str, Any]]:
    """Name, type, shape and quantization of every input or output of `main`."""
    main = packed["main"]
    attrs = main.attrs or {}
    returned, _ = stages.outputs(main)
    values = list(main.params) if side == "inputs" else list(returned.fields)
    names = [p.name for p in main.params] if side == "inputs" else [str(n) for n in attrs["hawq.output_names"]]
    key = f"hawq.{side[:-1]}_types"
    types = [str(t) for t in attrs[key]] if key in attrs else [ops.dtype_of(v) for v in values]
    ranges = stages.narrow_inputs(main) if side == "inputs" else [None] * len(values)
    declared = stages.declared_ranges(main) if side == "inputs" else {}
    described = []
    for value, name, kind, limits in zip(values, names, types, ranges, strict=True):
        entry: dict[str, Any] = {
            "name": name,
            "type": kind,
            "dtype": ops.dtype_of(value),
            "shape": list(ops.shape_of(value)),
        }
        if limits is not None:
            entry["range"] = list(limits)
        if name in declared:
            entry["saturates"] = list(declared[name])
        border = _border_call(packed, value, side)
        if border is not None:
            scale, zero = (ops.const_value(a).reshape(-1) for a in border.args[1:3])
            entry["quantization"] = {
                "scale": [float(s) for s in scale],
                "zero_point": [int(z) for z in zero],
                "qmin": int(border.attrs["qmin"]),
                "qmax": int(border.attrs["qmax"]),
                "rounding": str(border.attrs["rounding"]) if side == "inputs" else "none",
            }
        described.append(entry)
    return described


def _border_call(packed: tvm.IRModule, value: relax.Expr, side: str) -> relax.Call | None:
    """The quantize that reads an input, or the dequantize that made an output."""
    wanted = "hawq.quantize" if side == "inputs" else "hawq.dequantize"
    for b in stages.bindings(packed["main"]):
        call = b.value
        if not (isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.GlobalVar)):
            continue
        touches = any(a.same_as(value) for a in call.args) if side == "inputs" else b.var.same_as(value)
        inner = [i.value for i in stages.bindings(packed[call.op]) if ops.op_name(i.value) == wanted]
        if touches and inner:
            return inner[0]
    return None

"""Pack 4-bit tensors between layers two to a byte (A20; PACKED -> PACKED), where kernels multiply or open nibbles.

1. The result of a layer whose elements lie in -8..7 (int8) or 0..15 (uint8), with a last dimension that is a multiple
   of MULTIPLE, and that some convolution or matrix product with 4-bit weights reads as its data -> packed; the layers
   that read it begin with unpack_int4.
2. Not packed: what the model returns, what other operations of main read, what a contraction with other weights reads
   as its data, and data with a border of other values than 0.
"""

from __future__ import annotations

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, ranges, stages
from hawq_tvm.core.attributes import Conv2d
from hawq_tvm.core.intervals import Interval
from hawq_tvm.core.rewriter import Rebuild

MULTIPLE = 8  # elements: four bytes, which kernels copy together
CONTRACTIONS = frozenset({"relax.nn.conv2d", "relax.matmul"})


def pack_activations(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with its 4-bit tensors between layers packed, and how many there were."""
    calls = [
        b
        for b in stages.bindings(module["main"])
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar)
    ]
    intervals = ranges.module_ranges(module)
    signs = {b.var: sign for b in calls if (sign := _sign(b.var, intervals)) is not None}
    readers = _readers(module, calls)
    chosen = {v: s for v, s in signs.items() if v in readers and _pays([(module[gv], i) for gv, i in readers[v]])}
    if not chosen:
        return module, 0
    return _rewritten(module, chosen), len(chosen)


def _sign(var: relax.Var, intervals: dict[str, Interval]) -> bool | None:
    """Whether a layer's 4-bit result is signed; None where it has more bits or another form."""
    if isinstance(var.ty, relax.TupleType) or ops.dtype_of(var) not in ("int8", "uint8"):
        return None
    shape, signed = ops.shape_of(var), ops.dtype_of(var) == "int8"
    least, most = arith.RANGES["int4" if signed else "uint4"]
    low, high = intervals[var.name].scalar
    return signed if len(shape) > 1 and shape[-1] % MULTIPLE == 0 and least <= low and high <= most else None


Readers = dict[relax.Var, list[tuple[tvm.ir.GlobalVar, int]]]


def _readers(module: tvm.IRModule, calls: list[relax.VarBinding]) -> Readers:
    """The layers and their parameters that read a variable, for variables that nothing else reads."""
    readers: Readers = {}
    functions = [str(b.value.op.name_hint) for b in calls]
    for b in calls:
        for i, arg in enumerate(b.value.args):
            if isinstance(arg, relax.Var):
                readers.setdefault(arg, []).append((b.value.op, i))
    own = {b.var for b in calls}
    elsewhere = [b.value for b in stages.bindings(module["main"]) if b.var not in own] + [module["main"].body.body]
    for expr in elsewhere:
        for v in ops.variables(expr):
            readers.pop(v, None)
    return {v: r for v, r in readers.items() if all(functions.count(gv.name_hint) == 1 for gv, _ in r)}


def _pays(readers: list[tuple[relax.Function, int]]) -> bool:
    """Whether some contraction with 4-bit weights reads a parameter as its data, and none with other weights."""
    kinds = [_contraction(func, func.params[i]) for func, i in readers]
    return True in kinds and False not in kinds


def _contraction(func: relax.Function, param: relax.Var) -> bool | None:
    """Whether the contraction that reads a parameter as its data can take nibbles; None where there is none."""
    values = {b.var: b.value for b in stages.bindings(func)}
    for call in values.values():
        if ops.op_name(call) not in CONTRACTIONS:
            continue
        data, weights = call.args[0], values.get(call.args[1])
        border = values.get(data)
        if isinstance(border, relax.Call) and ops.op_name(border) == "relax.nn.pad" and border.args[0].same_as(param):
            if int(border.attrs.pad_value) != 0 or any(int(w) for w in list(border.attrs.pad_width)[-2:]):
                return False
            data = border.args[0]
        if data.same_as(param):
            grouped = ops.op_name(call) == "relax.nn.conv2d" and Conv2d.of(call).groups > 1
            if not isinstance(weights, relax.Call) or ops.op_name(weights) != "hawq.unpack_int4":
                return False
            return int(weights.attrs["signed"]) == 1 and not grouped
        if call.args[1].same_as(param):
            return False
    return None


def _rewritten(module: tvm.IRModule, chosen: dict[relax.Var, bool]) -> tvm.IRModule:
    main = module["main"]
    rebuild = Rebuild(module)
    builder = rebuild.builder
    layers = {}
    for b in stages.bindings(main):
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar):
            signs = [chosen.get(a) if isinstance(a, relax.Var) else None for a in b.value.args]
            layers[b.var] = builder.add_func(_layer(module, b.value.op, signs, b.var in chosen), b.value.op.name_hint)
    returned, aliases = stages.outputs(main)
    with builder.function("main", list(main.params)):
        with builder.dataflow():
            for b in stages.bindings(main):
                if b.var in layers:
                    rebuild.env[b.var] = rebuild.emit(
                        relax.Call(layers[b.var], [rebuild.map(a) for a in b.value.args]), b.var.name
                    )
                elif b.var not in aliases:
                    rebuild.env[b.var] = rebuild.emit(rebuild.map(b.value), b.var.name)
            output = builder.emit_output(rebuild.map(returned))
        builder.emit_func_output(output)
    new = builder.get()
    attrs = {k: v for k, v in (main.attrs or {}).items() if k != "global_symbol"}
    new.update_func(new.get_global_var("main"), new["main"].with_attrs(attrs))
    return new


def _layer(module: tvm.IRModule, gv: tvm.ir.GlobalVar, signs: list[bool | None], packs: bool) -> relax.Function:
    """A layer whose parameters with a sign are packed, and its result if `packs`."""
    func = module[gv]
    if not packs and all(s is None for s in signs):
        return func
    rebuild = Rebuild(module)
    builder, params = rebuild.builder, []
    for p, sign in zip(func.params, signs, strict=True):
        *lead, last = ops.shape_of(p)
        params.append(p if sign is None else relax.Var(p.name, relax.TensorType((*lead, last // 2), "uint8")))
    with builder.function("layer", params, private=True):
        with builder.dataflow():
            for old, p, sign in zip(func.params, params, signs, strict=True):
                rebuild.env[old] = (
                    p if sign is None else rebuild.emit(ops.unpack_int4(p, ops.shape_of(old), sign), f"{p.name}.opened")
                )
            for b in stages.bindings(func):
                rebuild.env[b.var] = rebuild.emit(rebuild.map(b.value), b.var.name)
            result = rebuild.map(func.body.body)
            result = builder.emit_output(ops.pack_int4(result) if packs else result)
        builder.emit_func_output(result)
    return builder.get()["layer"].with_attrs({k: v for k, v in (func.attrs or {}).items() if k != "global_symbol"})

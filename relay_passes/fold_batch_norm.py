"""Fold BatchNorm into quantized weights' scales, exactly in real arithmetic (ANNOTATED -> ANNOTATED).

With  a = gamma / sqrt(var + epsilon)  and  c = beta - mean a  per channel:
1. batch_norm(conv(x, dequantize(w, s, z)) [+ bias])  -> conv(x, dequantize(w, s a, z)) + (c [+ bias a])
2. the same for a transposed convolution
3. any other batch_norm                                -> x * a + c
The integers of w do not change: only what they stand for. Cases 1 and 2 need the convolution (and the sum) to have no
other consumer; otherwise case 3 applies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.rewriter import Rebuild, rewrite_main, use_counts

_OUTPUT_AXIS = {"relax.nn.conv2d": 0, "relax.nn.conv2d_transpose": 1}


def fold_batch_norm(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module without batch_norm, and how many there were."""
    main = module["main"]
    values = {b.var: b.value for b in stages.bindings(main)}
    uses = use_counts(main)
    count = 0

    def producer(expr: relax.Expr) -> Any:
        return values.get(expr) if isinstance(expr, relax.Var) and uses[expr] == 1 else None

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        if isinstance(value, relax.TupleGetItem):
            norm = values.get(binding.value.tuple_value)
            if ops.op_name(norm) == "relax.nn.batch_norm" and int(value.index) == 0:
                count += 1
                return _replace(rebuild, binding.var.name, norm, producer, values)
        if ops.op_name(value) == "relax.nn.batch_norm":
            return relax.Tuple([rebuild.map(a) for a in binding.value.args[:1]])
        return None

    return rewrite_main(module, visit), count


def _replace(
    rebuild: Rebuild, name: str, norm: relax.Call, producer: Any, values: dict[relax.Var, relax.Expr]
) -> relax.Expr:
    gamma, beta, mean, var = (ops.const_value(a).astype(np.float64) for a in norm.args[1:])
    attrs = norm.attrs
    factor = (gamma if bool(attrs.scale) else 1.0) / np.sqrt(var + float(attrs.epsilon))
    addend = (beta if bool(attrs.center) else 0.0) - mean * factor
    rank, axis = len(ops.shape_of(norm.args[0])), int(attrs.axis)
    shape = [-1 if i == axis else 1 for i in range(rank)]
    folded = _fold_into_weight(rebuild, name, norm.args[0], producer, values, factor) if axis == 1 else None
    if folded is None:
        scaled = rebuild.emit(relax.op.multiply(rebuild.map(norm.args[0]), _real(factor, shape)), f"{name}.scale")
        return relax.op.add(scaled, _real(addend, shape))
    conv, bias = folded
    return relax.op.add(conv, _real(addend + bias * factor, shape))


def _real(array: np.ndarray[Any, Any], shape: list[int]) -> relax.Expr:
    with np.errstate(over="ignore"):  # what float32 does not hold is refused where it is read
        return relax.const(np.asarray(array).reshape(shape).astype(np.float32))


def _fold_into_weight(
    rebuild: Rebuild,
    name: str,
    source: relax.Expr,
    producer: Any,
    values: dict[relax.Var, relax.Expr],
    factor: np.ndarray[Any, Any],
) -> tuple[relax.Expr, Any] | None:
    """Cases 1 and 2: the new convolution and the old bias per channel, or None when the structure is not there."""
    conv = producer(source)
    bias: np.ndarray[Any, Any] | None = np.zeros(1)
    if ops.op_name(conv) == "relax.add":
        total, bias = ops.shape_of(conv), _constant(conv.args[1], values)
        if bias is None or not _per_channel(bias, factor.size, len(total)):
            return None
        conv, bias = producer(conv.args[0]), bias.reshape(-1)
    axis = _OUTPUT_AXIS.get(ops.op_name(conv))
    if axis is None:
        return None
    weight = values.get(conv.args[1], conv.args[1]) if isinstance(conv.args[1], relax.Var) else conv.args[1]
    if ops.op_name(weight) != "hawq.dequantize":
        return None
    integers = weight.args[0] if ops.is_const(weight.args[0]) else values.get(weight.args[0])
    groups = int(conv.attrs.groups)
    if integers is None or not ops.is_const(integers) or (axis == 1 and groups != 1):
        return None
    scale = ops.const_value(weight.args[1]).astype(np.float64) * factor.reshape(
        [-1 if i == axis else 1 for i in range(4)]
    )
    new = ops.dequantize(
        integers, scale, ops.const_value(weight.args[2]), qmin=int(weight.attrs["qmin"]), qmax=int(weight.attrs["qmax"])
    )
    kernel = rebuild.emit(new, f"{name}.weight")
    call = relax.Call(conv.op, [rebuild.map(conv.args[0]), kernel], attrs=conv.attrs)
    return rebuild.emit(call, f"{name}.conv"), bias


def _per_channel(bias: np.ndarray[Any, Any], channels: int, rank: int) -> bool:
    """Whether a constant adds one number, or one to every channel (axis 1), and to nothing else."""
    full = (1,) * (rank - bias.ndim) + bias.shape
    return bias.ndim <= rank and all(n == (channels if axis == 1 else 1) or n == 1 for axis, n in enumerate(full))


def _constant(expr: relax.Expr, values: dict[relax.Var, relax.Expr]) -> np.ndarray[Any, Any] | None:
    """The real value of a float constant or of a dequantized integer constant."""
    value = values.get(expr, expr) if isinstance(expr, relax.Var) else expr
    if ops.is_const(value):
        return ops.const_value(value).astype(np.float64)
    if ops.op_name(value) == "hawq.dequantize":
        data = values.get(value.args[0], value.args[0]) if isinstance(value.args[0], relax.Var) else value.args[0]
        if ops.is_const(data):
            scale, zero = (ops.const_value(a).astype(np.float64) for a in value.args[1:])
            return np.asarray((ops.const_value(data).astype(np.float64) - zero) * scale)
    return None

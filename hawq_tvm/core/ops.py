"""The Relax operators of our own: registration, type rules and typed constructors.

Semantics are in ARITHMETIC.md, quoted by number. Every array operand that is a scale, zero point,
multiplier, offset, shift or table is a Relax constant; scales, zero points, multipliers, offsets and
shifts broadcast against the data as NumPy arrays do, so no operator needs an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import _ffi_api as _ir_ffi

from . import arith
from .errors import ModelError
from .interpolation import Steps
from .layer_norm import Norm
from .limits import MAX_ELEMENTS


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The static shape of a Relax expression; every shape in this project is static."""
    return tuple(int(d) for d in expr.ty.shape.values[:])


def dtype_of(expr: relax.Expr) -> str:
    """The dtype of a Relax tensor expression, as a string."""
    return str(expr.ty.dtype)


def is_const(expr: relax.Expr) -> bool:
    """Whether an expression is a Relax tensor constant."""
    return isinstance(expr, tvm.ir.GenericConst)


def const_value(expr: relax.Expr) -> np.ndarray[Any, Any]:
    """The array of a Relax constant, to be read only."""
    try:
        value: np.ndarray[Any, Any] = np.from_dlpack(expr.value)  # without a copy
    except RuntimeError:  # of a type that NumPy has not
        value = expr.value.numpy()
    value.flags.writeable = False
    return value


def op_name(expr: relax.Expr) -> str:
    """The operator's name when `expr` is a call of one ("relax.nn.conv2d"), else the empty string."""
    return expr.op.name if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) else ""


# Slices of TVM's arrays: it makes a list of one at once, and takes ten times as long to step through it.
_PARTS: dict[type, Callable[[Any], list[relax.Expr]]] = {
    relax.Call: lambda call: call.args[:],
    relax.Tuple: lambda pair: pair.fields[:],
    relax.TupleGetItem: lambda item: [item.tuple_value],
}


def variables(expr: relax.Expr) -> list[relax.Var]:
    """The variables an expression reads, with repetition, in order."""
    if parts := _PARTS.get(type(expr)):
        return [v for part in parts(expr) for v in variables(part)]
    return [expr] if isinstance(expr, relax.Var) else []


def replaced(expr: relax.Expr, leaf: Callable[[relax.Expr], relax.Expr]) -> relax.Expr:
    """`expr` with `leaf` of every variable, constant and shape in it; calls and tuples are made anew around them."""
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([replaced(f, leaf) for f in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(replaced(expr.tuple_value, leaf), expr.index)
    if isinstance(expr, relax.Call):
        args, given = expr.args[:], [replaced(a, leaf) for a in expr.args[:]]
        # TVM takes half a millisecond to infer a convolution's type; of the same types it is the same.
        same = all(a.same_as(b) or a.ty.same_as(b.ty) for a, b in zip(args, given, strict=True))
        kind = expr.ty if same else None
        return relax.Call(expr.op, given, attrs=expr.attrs, ty_args=expr.ty_args, ret_ty=kind)
    return leaf(expr)


def renamed(expr: relax.Expr, names: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """`expr` with its variables replaced by what they are mapped to; a variable that is not mapped stays."""
    return replaced(expr, lambda e: names.get(e, e) if isinstance(e, relax.Var) else e)


class Builder(relax.BlockBuilder):
    """TVM's BlockBuilder, whose functions may be left by an error: its own then warns on standard error of the block
    that was left open.
    """

    def _exit_function_scope(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if exc_type is not None:
            self._end_block()
        super()._exit_function_scope(exc_type, exc_val, exc_tb)


class Emitter:
    """Binds expressions to variables of a function under construction, under the names of the user's layers.

    BlockBuilder.emit would replace the dots that PyTorch's names contain; a name that is taken gets a number.
    """

    def __init__(self, builder: relax.BlockBuilder, taken: Iterable[str] = ()) -> None:
        self.builder, self.taken = builder, set(taken)

    def __call__(self, expr: relax.Expr, name: str) -> relax.Var:
        """A variable bound to `expr`; variables are returned as they are.

        Raises ModelError naming the layer when the result would have no element or more than MAX_ELEMENTS: nothing
        has been computed then.
        """
        if isinstance(expr, relax.Var):
            return expr
        unique, count = name, 1
        while unique in self.taken:
            unique, count = f"{name}_{count}", count + 1
        self.taken.add(unique)
        value = self.builder.normalize(expr)
        _check_size(value.ty, name)
        var = relax.DataflowVar(unique, value.ty)
        self.builder.emit_normalized(relax.VarBinding(var, value))
        return var

    def keep(self, binding: relax.VarBinding) -> bool:
        """Take over a binding that has been checked as it is; False, and nothing done, where its name is taken."""
        if binding.var.name in self.taken:
            return False
        self.taken.add(binding.var.name)
        self.builder.emit_normalized(binding)
        return True


def _check_size(kind: Any, name: str) -> None:
    for field in getattr(kind, "fields", None) or [kind]:
        shape = (
            [int(d) for d in field.shape.values[:]]
            if isinstance(field, relax.TensorType) and field.shape is not None
            else []
        )
        if any(d < 1 for d in shape) or math.prod(shape) > MAX_ELEMENTS:
            expected = f"sizes of at least 1, at most {MAX_ELEMENTS} elements"
            raise ModelError("gives a tensor of impossible shape", where=name, expected=expected, found=str(shape))


def _tensor(shape: Sequence[int], dtype: str) -> relax.TensorType:
    return relax.TensorType(tuple(int(d) for d in shape), dtype)


def _fitting(call: relax.Call, shape: Sequence[int], constants: Iterable[relax.Expr]) -> relax.TensorType:
    """The type of a result whose shape the data alone decide: a constant that would enlarge it raises ValueError."""
    for c in constants:
        own = shape_of(c)
        if own and np.broadcast_shapes(own, tuple(shape)) != tuple(shape):
            raise ValueError(
                f"{call.op.name}: a constant of shape {list(own)} does not fit data of shape {list(shape)}"
            )
    return _tensor(shape, call.attrs["out_dtype"])


def _same_shape_as_first(call: relax.Call, _: Any) -> relax.TensorType:
    return _fitting(call, shape_of(call.args[0]), call.args[1:])


def _infer_requantize(call: relax.Call, _: Any) -> relax.TensorType:
    data, multipliers, offset, shift = call.args
    return _fitting(
        call, np.broadcast_shapes(*(shape_of(a) for a in data.fields)), [*multipliers.fields, offset, shift]
    )


def _infer_lookup(call: relax.Call, _: Any) -> relax.TensorType:
    return _tensor(shape_of(call.args[0]), dtype_of(call.args[1]))


def spatial_axes(layout: str) -> tuple[int, int]:
    """The positions of H and W in a four-letter layout such as NCHW."""
    return layout.index("H"), layout.index("W")


def _infer_sum_pool2d(call: relax.Call, _: Any) -> relax.TensorType:
    shape, attrs = list(shape_of(call.args[0])), call.attrs
    for i, axis in enumerate(spatial_axes(attrs["layout"])):
        window = (int(attrs["pool_size"][i]) - 1) * int(attrs["dilation"][i]) + 1
        shape[axis] = (shape[axis] - window) // int(attrs["strides"][i]) + 1
    return _tensor(shape, attrs["out_dtype"])


def _infer_dilate2d(call: relax.Call, _: Any) -> relax.TensorType:
    shape = list(shape_of(call.args[0]))
    for i, axis in enumerate(spatial_axes(call.attrs["layout"])):
        shape[axis] = (shape[axis] - 1) * int(call.attrs["strides"][i]) + 1
    return _tensor(shape, dtype_of(call.args[0]))


def _infer_unpack_int4(call: relax.Call, _: Any) -> relax.TensorType:
    return _tensor(call.attrs["shape"], "int8" if int(call.attrs["signed"]) else "uint8")


def _infer_pack_int4(call: relax.Call, _: Any) -> relax.TensorType:
    *lead, last = shape_of(call.args[0])
    return _tensor((*lead, last // 2), "uint8")


def _infer_dynamic_quantize(call: relax.Call, _: Any) -> relax.TupleType:
    types = [_tensor(shape_of(call.args[0]), "uint8"), _tensor((), "float32"), _tensor((), "uint8")]
    return relax.TupleType(types)


_TYPE_RULES: dict[str, Callable[[relax.Call, Any], Any]] = {
    "hawq.quantize": _same_shape_as_first,
    "hawq.dequantize": _same_shape_as_first,
    "hawq.dynamic_quantize": _infer_dynamic_quantize,
    "hawq.requantize": _infer_requantize,
    "hawq.lookup": _infer_lookup,
    "hawq.interpolate": lambda call, _: _tensor(shape_of(call.args[0]), "int32"),
    "hawq.sum_pool2d": _infer_sum_pool2d,
    "hawq.dilate2d": _infer_dilate2d,
    "hawq.softmax": lambda call, _: _tensor(shape_of(call.args[0]), call.attrs["out_dtype"]),
    "hawq.softmax_wide": lambda call, _: _tensor(shape_of(call.args[0]), call.attrs["out_dtype"]),
    "hawq.layer_norm": lambda call, _: _tensor(shape_of(call.args[0]), "int32"),
    "hawq.unpack_int4": _infer_unpack_int4,
    "hawq.pack_int4": _infer_pack_int4,
}


def register(name: str, infer: Callable[[relax.Call, Any], Any]) -> None:
    """Make an operator known to TVM; infer: the type of a call's result."""
    _ir_ffi.RegisterOp(name, "See hawq_tvm/ARITHMETIC.md.")
    tvm.ir.register_op_attr(name, "FInferType", infer)
    tvm.ir.register_op_attr(name, "FPurity", True)


for _name, _rule in _TYPE_RULES.items():
    register(_name, _rule)


def _call(name: str, args: list[relax.Expr], **attrs: Any) -> relax.Call:
    return relax.Call(tvm.ir.Op.get(name), args, attrs=tvm.ir.make_node("ir.DictAttrs", **attrs))


def const(value: Any, dtype: str) -> relax.Expr:
    """A Relax constant of the given dtype."""
    # Of an array `relax.const` would make a copy before its own, and TVM's own copy takes long to begin.
    array = np.asarray(value, dtype)
    made = tvm.runtime.empty(array.shape, array.dtype)
    try:
        np.from_dlpack(made)[...] = array
    except RuntimeError:  # of a type that NumPy has not
        made.copyfrom(array)
    return relax.const(made, dtype)


def quantize(
    x: relax.Expr,
    scale: Any,
    zero_point: Any,
    *,
    qtype: arith.QType,
    rounding: str = "half_even",
    form: str = "divide",
    branches: str = "common",
    through: str = "",
) -> relax.Call:
    """(A2) float tensor to integers of `qtype`; scale and zero_point are arrays that broadcast against x.

    form: "divide" (ONNX), "float16" or "bfloat16" where the quotient is one of these (A2d), "reciprocal" (PyTorch) or
    "affine" (QONNX, A2a).  through: a 16-bit float type that x is rounded to first.  branches: how an addition just
    before is rounded, "common" once on the sum (A13) or "each" branch on its own (A14, as HAWQ does).
    """
    return _call(
        "hawq.quantize",
        [x, const(scale, "float32"), const(zero_point, "int32")],
        qmin=qtype.qmin,
        qmax=qtype.qmax,
        out_dtype=qtype.storage,
        rounding=rounding,
        form=form,
        branches=branches,
        through=through,
    )


def dequantize(
    x: relax.Expr,
    scale: Any,
    zero_point: Any,
    *,
    qmin: int,
    qmax: int,
    through: str = "",
    out_dtype: str = "float32",
    bound: float = 0.0,
) -> relax.Call:
    """(A1) integers to float32: (x - zero_point) * scale; qmin, qmax declare the integer range of x.

    The scale is float32 as models store it, or float64 when a pass has folded real factors into it.  through: a
    narrower float type that the result is rounded to.  out_dtype: its type, that one or float32.  bound: how far the
    integers' real numbers are at most from what the model computes (A1b).
    """
    scale = np.asarray(scale)
    dtype = "float64" if scale.dtype == np.float64 else "float32"
    args = [x, const(scale, dtype), const(zero_point, "int32")]
    known = {"bound": float(bound)} if bound else {}
    return _call("hawq.dequantize", args, qmin=qmin, qmax=qmax, through=through, out_dtype=out_dtype, **known)


def dynamic_quantize(x: relax.Expr) -> relax.Call:
    """(A2b) ONNX DynamicQuantizeLinear: a tuple (uint8 tensor, float32 scale, uint8 zero point)."""
    return _call("hawq.dynamic_quantize", [x])


def requantize(
    data: Sequence[relax.Expr],
    multipliers: Sequence[Any],
    offset: Any,
    shift: Any,
    *,
    qtype: arith.QType,
    zero_point: int,
    rounding: str,
    thresholds: int = 0,
    differing: int = 0,
    bound: float | None = None,
) -> relax.Call:
    """(A9) clamp(round((sum x_i m_i + offset) / 2^shift) + zero_point) to `qtype`; one to many operands.

    multipliers int32, offset int64, shift int32 constants.  thresholds, differing: the proof (A22) of this
    call's dyadic numbers against the real scales they came from; 0 and 0 when there was no real scale.  bound: of a
    fixed-point value (A26), and where thresholds is -1, how far its sum can be from the real one before the rounding,
    in steps.
    """
    if rounding not in arith.ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}: one of {', '.join(arith.ROUNDINGS)}")
    fields = relax.Tuple([const(m, "int32") for m in multipliers])
    return _call(
        "hawq.requantize",
        [relax.Tuple(list(data)), fields, const(offset, "int64"), const(shift, "int32")],
        qmin=qtype.qmin,
        qmax=qtype.qmax,
        out_dtype=qtype.storage,
        zero_point=int(zero_point),
        rounding=rounding,
        thresholds=thresholds,
        differing=differing,
        **({} if bound is None else {"bound": bound}),
    )


def lookup(x: relax.Expr, table: np.ndarray[Any, Any], **approximation: float) -> relax.Call:
    """(A16) table[x - min(dtype of x)]: any unary function of an 8 or 16-bit tensor; table has 2^bits entries.

    approximation: where x is a grid for a wider value (A27), or the result a fixed-point value (A26), `bound`: how
    much more than its rounding the result can be wrong by, in steps; `thresholds` and `differing` as of a requantize.
    """
    return _call("hawq.lookup", [x, const(table, str(table.dtype))], **approximation)


def interpolate(
    u: relax.Expr, table: np.ndarray[Any, Any], steps: Steps, *, bound: float, slope: float, **proof: int
) -> relax.Call:
    """(A31) the polynomials of a function in the cells of a grid, at its integers 0 .. cells 2^steps.cell - 1 in int32.

    table: int32 of shape (3, cells).  bound: how far a result can be from the function of what its integer stands for,
    more than its rounding, in steps.  slope: by how much that changes from one integer to the next.  proof: of the
    quantize that follows, `thresholds` and `differing` as of a requantize.
    """
    return _call("hawq.interpolate", [u, const(table, "int32")], **steps.to_dict(), bound=bound, slope=slope, **proof)


def sum_pool2d(
    x: relax.Expr,
    pool_size: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    *,
    layout: str = "NCHW",
    out_dtype: str = "int32",
) -> relax.Call:
    """(A15) the sum over each window, in out_dtype; windows never leave the tensor: pad first."""
    return _call(
        "hawq.sum_pool2d",
        [x],
        pool_size=list(pool_size),
        strides=list(strides),
        dilation=list(dilation),
        layout=layout,
        out_dtype=out_dtype,
    )


def dilate2d(x: relax.Expr, strides: Sequence[int], fill: int, *, layout: str = "NCHW") -> relax.Call:
    """`fill` inserted between neighbours so that they stand strides apart: a transposed convolution's input."""
    return _call("hawq.dilate2d", [x], strides=list(strides), fill=int(fill), layout=layout)


def softmax(
    x: relax.Expr,
    table: np.ndarray[Any, Any],
    *,
    axis: int,
    multiplier: int,
    shift: int,
    qtype: arith.QType,
    zero_point: int,
    rounding: str = "half_even",
    fixed: bool = False,
) -> relax.Call:
    """(A17) softmax along `axis` by a table of exponents, whose first is 2^30, and one reciprocal in each row.

    rounding: half to even, or "floor".  fixed: whether its scale is one that no model asked for, so that the proof
    hands its distance on.
    """
    return _call(
        "hawq.softmax",
        [x, const(table, "int32")],
        axis=axis,
        multiplier=multiplier,
        shift=shift,
        qmin=qtype.qmin,
        qmax=qtype.qmax,
        out_dtype=qtype.storage,
        zero_point=int(zero_point),
        rounding=rounding,
        **({"bound": 0.0} if fixed else {}),
    )


def softmax_wide(
    x: relax.Expr, tables: Sequence[np.ndarray[Any, Any]], *, fraction: int, **attributes: Any
) -> relax.Call:
    """(A24) softmax of int32 scores on a grid of 2^-fraction powers of two, by two tables; else as `softmax`."""
    made = softmax(x, tables[0], **attributes)
    args = [x, *(const(t, "int32") for t in tables)]
    return _call("hawq.softmax_wide", args, fraction=fraction, **{str(k): made.attrs[k] for k in made.attrs.keys()})  # noqa: SIM118


def layer_norm(x: relax.Expr, axes: Sequence[int], norm: Norm) -> relax.Call:
    """(A25) each row over `axes` without its mean and divided by its deviation, in int32 with norm.fraction bits."""
    return _call("hawq.layer_norm", [x], axes=sorted(int(a) for a in axes), **norm.to_dict())


def unpack_int4(packed: np.ndarray[Any, Any] | relax.Expr, shape: Sequence[int], signed: bool) -> relax.Call:
    """(A20) a tensor of `shape` from 4-bit values packed two to a byte, int8 when signed, else uint8."""
    operand = const(packed, "uint8") if isinstance(packed, np.ndarray) else packed
    return _call("hawq.unpack_int4", [operand], shape=list(shape), signed=int(signed))


def pack_int4(x: relax.Expr) -> relax.Call:
    """(A20) 8-bit elements in -8..7 or 0..15, two to a byte; the last dimension is even and half as long in the
    result.
    """
    return _call("hawq.pack_int4", [x])

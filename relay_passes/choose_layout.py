"""Choose channels-last for the whole graph, once (INTEGER -> INTEGER).

Every tensor has a logical form (as the model wrote it, NCHW) and, when it is of rank 4, may have a channels-last
form; each is made at most once, by permute_dims, or by reshape when that moves nothing. 1. conv2d, pools, dilate2d,
pad of rank 4          -> channels-last form (weights OIHW -> HWIO at compile time) 2. element-wise operators with a
channels-last operand -> channels-last, their constants permuted 3. concat, reductions, softmax, slices, take on a
channels-last operand -> the same with the axis renamed 4. permute_dims of a channels-last tensor         -> one
composed permute_dims, or nothing 5. everything else, and the outputs                -> logical form
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.operators import Kind, kind_of
from hawq_tvm.core.rewriter import Rebuild, rewrite_main

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
AXIS = {0: 0, 1: 3, 2: 1, 3: 2}  # where a logical (NCHW) axis is in NHWC


def _moves_nothing(shape: Sequence[int]) -> bool:
    return shape[1] == 1 or (shape[2] == 1 and shape[3] == 1)


class _Layout:
    """The two forms of every tensor of the new main."""

    def __init__(self) -> None:
        self.last: dict[relax.Expr, relax.Expr] = {}
        self.logical: dict[relax.Expr, relax.Expr] = {}
        self.count = 0

    def is_last(self, expr: relax.Expr) -> bool:
        return isinstance(expr, relax.Var) and expr in self.last

    def to_last(self, rebuild: Rebuild, var: relax.Var) -> relax.Expr:
        if var not in self.last:
            self.last[var] = self._convert(rebuild, self.logical[var], TO_LAST, ops.shape_of(var), f"{var.name}.nhwc")
        return self.last[var]

    def to_logical(self, rebuild: Rebuild, var: relax.Var) -> relax.Expr:
        if var not in self.logical:
            self.logical[var] = self._convert(rebuild, self.last[var], TO_FIRST, ops.shape_of(var), f"{var.name}.nchw")
        return self.logical[var]

    def _convert(
        self, rebuild: Rebuild, expr: relax.Expr, axes: Sequence[int], logical: Sequence[int], name: str
    ) -> relax.Expr:
        self.count += 1
        shape = ops.shape_of(expr)
        if _moves_nothing(logical):
            return rebuild.emit(relax.op.reshape(expr, tuple(shape[a] for a in axes)), name)
        return rebuild.emit(relax.op.permute_dims(expr, list(axes)), name)


def _last_constant(expr: relax.Expr) -> relax.Expr:
    array = ops.const_value(expr)
    if array.size == 1:
        return expr
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return ops.const(array.transpose(TO_LAST), str(array.dtype))


def choose_layout(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with spatial operators in NHWC / HWIO, and how many operators and conversions that took."""
    layout = _Layout()
    for p in module["main"].params:
        layout.logical[p] = p
    outside = {str(n) for n in (module["main"].attrs or {}).get("hawq.float_tail", [])}

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        old = binding.value
        rank4 = hasattr(binding.var.ty, "shape") and len(ops.shape_of(binding.var)) == 4
        handler = _handler(ops.op_name(old)) if binding.var.name not in outside else None
        made = handler(layout, rebuild, binding, old) if handler is not None else None
        if made is not None:
            layout.count += 1
            new, is_last = made
            var = rebuild.emit(new, binding.var.name)
            (layout.last if is_last and rank4 else layout.logical)[binding.var] = var
            return var
        var = rebuild.emit(_logical(layout, rebuild, old), binding.var.name)
        layout.logical[binding.var] = var
        return var

    rewritten = rewrite_main(module, visit, result=lambda rebuild, expr: _logical(layout, rebuild, expr))
    return rewritten, layout.count


def _logical(layout: _Layout, rebuild: Rebuild, expr: relax.Expr) -> relax.Expr:
    """`expr` with every variable in its logical form."""
    return ops.replaced(expr, lambda e: layout.to_logical(rebuild, e) if isinstance(e, relax.Var) else e)


Made = tuple[relax.Expr, bool] | None
Handler = Callable[[_Layout, Rebuild, relax.VarBinding, relax.Call], Made]


def _conv2d(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    weight = call.args[1]
    if ops.is_const(weight):
        kernel = ops.const(ops.const_value(weight).transpose(2, 3, 1, 0), ops.dtype_of(weight))
    else:
        kernel = rebuild.emit(
            relax.op.permute_dims(layout.to_logical(rebuild, weight), [2, 3, 1, 0]), f"{binding.var.name}.hwio"
        )
    attrs = call.attrs
    data = layout.to_last(rebuild, call.args[0])
    return relax.op.nn.conv2d(
        data,
        kernel,
        strides=list(attrs.strides),
        padding=list(attrs.padding),
        dilation=list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="HWIO",
        out_layout="NHWC",
        out_dtype=str(attrs.out_dtype),
    ), True


def _max_pool2d(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    a = call.attrs
    data = layout.to_last(rebuild, call.args[0])
    pool = relax.op.nn.max_pool2d(
        data, list(a.pool_size), list(a.strides), list(a.padding), list(a.dilation), bool(a.ceil_mode), layout="NHWC"
    )
    return pool, True


def _sum_pool2d(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    a = call.attrs
    size, strides, dilation = ([int(v) for v in a[k]] for k in ("pool_size", "strides", "dilation"))
    data = layout.to_last(rebuild, call.args[0])
    return ops.sum_pool2d(data, size, strides, dilation, layout="NHWC", out_dtype=str(a["out_dtype"])), True


def _dilate2d(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    strides = [int(v) for v in call.attrs["strides"]]
    return ops.dilate2d(layout.to_last(rebuild, call.args[0]), strides, int(call.attrs["fill"]), layout="NHWC"), True


def _pad(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if len(ops.shape_of(call.args[0])) != 4 or str(call.attrs.pad_mode) != "constant":
        return None
    width = [int(w) for w in call.attrs.pad_width]
    pairs = [width[2 * a : 2 * a + 2] for a in TO_LAST]
    data = layout.to_last(rebuild, call.args[0])
    return relax.op.nn.pad(data, [w for p in pairs for w in p], "constant", call.attrs.pad_value), True


def _elementwise(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    name = ops.op_name(call)
    tensors = (
        list(call.args[0].fields) if name == "hawq.requantize" else [a for a in call.args if isinstance(a, relax.Var)]
    )
    tensors = [t for t in tensors if isinstance(t, relax.Var)]
    if not any(layout.is_last(t) for t in tensors) or any(len(ops.shape_of(t)) not in (0, 4) for t in tensors):
        return None

    def convert(arg: relax.Expr) -> relax.Expr:
        if isinstance(arg, relax.Var):
            return layout.to_last(rebuild, arg) if len(ops.shape_of(arg)) == 4 else layout.to_logical(rebuild, arg)
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([convert(f) for f in arg.fields])
        return _last_constant(arg) if ops.is_const(arg) else arg

    args = [convert(call.args[0]), *call.args[1:]] if name == "hawq.lookup" else [convert(a) for a in call.args]
    return relax.Call(call.op, args, attrs=call.attrs, ty_args=call.ty_args), True


def _concat(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    fields = list(call.args[0].fields)
    if len(ops.shape_of(binding.var)) != 4 or not any(layout.is_last(f) for f in fields):
        return None
    parts = [layout.to_last(rebuild, f) if isinstance(f, relax.Var) else _last_constant(f) for f in fields]
    return relax.op.concat(parts, AXIS[int(call.attrs.axis) % 4]), True


def _reduce(function: Callable[..., relax.Expr]) -> Handler:
    def handler(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
        if not layout.is_last(call.args[0]):
            return None
        axes = [int(a) % 4 for a in (call.attrs.axis if call.attrs.axis is not None else range(4))]
        keep = bool(call.attrs.keepdims)
        remaining = [a for a in range(4) if a not in axes]
        # Without keepdims the axes that remain must still be in the model's order.
        if not keep and sorted(AXIS[a] for a in remaining) != [AXIS[a] for a in remaining]:
            return None
        return function(layout.last[call.args[0]], [AXIS[a] for a in axes], keep), keep

    return handler


def _argument(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]) or call.attrs.axis is None or not bool(call.attrs.keepdims):
        return None
    function = relax.op.argmax if ops.op_name(call) == "relax.argmax" else relax.op.argmin
    return function(layout.last[call.args[0]], AXIS[int(call.attrs.axis) % 4], True), True


def _softmax(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]):
        return None
    a = call.attrs
    qtype = arith.QType(int(a["qmin"]), int(a["qmax"]), str(a["out_dtype"]))
    return ops.softmax(
        layout.last[call.args[0]],
        ops.const_value(call.args[1]),
        axis=AXIS[int(a["axis"]) % 4],
        multiplier=int(a["multiplier"]),
        shift=int(a["shift"]),
        qtype=qtype,
        zero_point=int(a["zero_point"]),
    ), True


def _strided_slice(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]):
        return None
    axes = [AXIS[int(f.value) % 4] for f in call.args[1].fields]
    rest = [[int(f.value) for f in a.fields] for a in call.args[2:]]
    return relax.op.strided_slice(layout.last[call.args[0]], axes, *rest), True


def _take(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]) or call.attrs.axis is None or len(ops.shape_of(call.args[1])) != 1:
        return None
    return relax.op.take(layout.last[call.args[0]], call.args[1], AXIS[int(call.attrs.axis) % 4]), True


def _permute_dims(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]) or call.args[0] in layout.logical:
        return None
    axes = [int(a) for a in call.attrs.axes] if call.attrs.axes is not None else [3, 2, 1, 0]
    composed = [AXIS[a] for a in axes]
    source = layout.last[call.args[0]]
    return (source if composed == [0, 1, 2, 3] else relax.op.permute_dims(source, composed)), False


_HANDLERS: dict[str, Handler] = {
    "relax.nn.conv2d": _conv2d,
    "relax.nn.max_pool2d": _max_pool2d,
    "hawq.sum_pool2d": _sum_pool2d,
    "hawq.dilate2d": _dilate2d,
    "relax.nn.pad": _pad,
    "relax.concat": _concat,
    "relax.sum": _reduce(relax.op.sum),
    "relax.max": _reduce(relax.op.max),
    "relax.min": _reduce(relax.op.min),
    "relax.argmax": _argument,
    "relax.argmin": _argument,
    "hawq.softmax": _softmax,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.permute_dims": _permute_dims,
}


def _handler(name: str) -> Handler | None:
    return _elementwise if kind_of(name) is Kind.ELEMENTWISE else _HANDLERS.get(name)

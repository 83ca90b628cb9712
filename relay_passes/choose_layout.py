"""Choose channels-last for the whole graph, once (INTEGER -> INTEGER).

Every tensor has a logical form (as the model wrote it, NCHW) and, when it is of rank 4 or 3, may have a channels-last
form; each is made at most once, by permute_dims, or by reshape when that moves nothing. A signal (N, C, L) is an image
of height 1: its channels-last form is the image's (N, 1, L, C), and what takes or gives that height moves nothing.
1. conv2d, pools, dilate2d, pad                         -> channels-last form (weights OIHW -> HWIO at compile time)
2. element-wise operators with a channels-last operand  -> channels-last, their constants permuted
3. concat, reductions, softmax, slices, take on a channels-last operand -> the same with the axis renamed
4. (N, C, L) to (N, C, 1, L) and back                   -> no operator while both are channels-last
5. permute_dims of a channels-last tensor               -> one composed permute_dims, or nothing
6. everything else, and the outputs                     -> logical form
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.layer_norm import norm_of
from hawq_tvm.core.operators import Kind, kind_of, reads_tables
from hawq_tvm.core.rewriter import Rebuild, rewrite_main

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
HEIGHT = 1  # where the height is in NHWC; a signal has 1 there
# Where a logical axis is in NHWC, for images (NCHW) and signals (NCL).
AXES = {4: (0, 3, 1, 2), 3: (0, 3, 2)}


def _image(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a signal as an image; an image's stays."""
    return (*shape[:2], 1, shape[2]) if len(shape) == 3 else tuple(shape)


def _is_view(call: relax.Call, result: relax.Var) -> bool:
    """Whether a call gives a signal the height 1, or takes it away."""
    if ops.op_name(call) not in ("relax.expand_dims", "relax.squeeze", "relax.reshape") or ops.is_const(call.args[0]):
        return False
    shapes = ops.shape_of(call.args[0]), ops.shape_of(result)
    return sorted(len(s) for s in shapes) == [3, 4] and _image(shapes[0]) == _image(shapes[1])


class _Layout:
    """The two forms of every tensor of the new main."""

    def __init__(self) -> None:
        self.last: dict[relax.Var, relax.Expr] = {}
        self.logical: dict[relax.Var, relax.Expr] = {}
        self.seen_from: dict[relax.Var, relax.Var] = {}  # a signal and its image have one channels-last form
        self.count = 0

    def _root(self, var: relax.Var) -> relax.Var:
        while var in self.seen_from:
            var = self.seen_from[var]
        return var

    def is_last(self, expr: relax.Expr) -> bool:
        return isinstance(expr, relax.Var) and self._root(expr) in self.last

    def to_last(self, rebuild: Rebuild, var: relax.Expr) -> relax.Expr:
        if ops.is_const(var):  # of a layer all of whose results are one number
            value = ops.const_value(var)
            return ops.const(value.reshape(_image(value.shape)).transpose(TO_LAST), ops.dtype_of(var))
        var = self._root(var)
        if var not in self.last:
            expr, shape = self.logical[var], _image(ops.shape_of(var))
            if ops.shape_of(var) != shape:
                expr = self._emit(rebuild, relax.op.reshape(expr, shape), f"{var.name}.image")
            self.last[var] = self._emit(rebuild, _permuted(expr, TO_LAST), f"{var.name}.nhwc")
        return self.last[var]

    def to_logical(self, rebuild: Rebuild, var: relax.Var) -> relax.Expr:
        if var not in self.logical:
            root, shape = self._root(var), ops.shape_of(var)
            if root in self.logical:
                new, name = relax.op.reshape(self.logical[root], shape), var.name
            elif len(shape) == 4:
                new, name = _permuted(self.last[root], TO_FIRST), f"{var.name}.nchw"
            else:
                new, name = self.signal(rebuild, var, (0, 2, 1)), f"{var.name}.ncl"
            self.logical[var] = self._emit(rebuild, new, name)
        return self.logical[var]

    def signal(self, rebuild: Rebuild, var: relax.Var, axes: Sequence[int]) -> relax.Expr:
        """The channels-last form of `var` without its height; axes: its order, from (N, L, C)."""
        last = self.last[self._root(var)]
        n, _, length, channels = ops.shape_of(last)
        shape = (n, length, channels)
        if _in_order(shape, axes):
            return relax.op.reshape(last, tuple(shape[a] for a in axes))
        flat = self._emit(rebuild, relax.op.reshape(last, shape), f"{var.name}.nlc")
        return relax.op.permute_dims(flat, list(axes))

    def _emit(self, rebuild: Rebuild, expr: relax.Expr, name: str) -> relax.Expr:
        self.count += not isinstance(expr, relax.Var)
        return rebuild.emit(expr, name)


def _in_order(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether a permutation leaves every element where it is in memory."""
    order = [a for a in axes if shape[a] > 1]
    return order == sorted(order)


def _permuted(expr: relax.Expr, axes: Sequence[int]) -> relax.Expr:
    """permute_dims, or a reshape where that moves nothing."""
    shape = ops.shape_of(expr)
    if _in_order(shape, axes):
        return relax.op.reshape(expr, tuple(shape[a] for a in axes))
    return relax.op.permute_dims(expr, list(axes))


def _last_constant(expr: relax.Expr, rank: int) -> relax.Expr:
    array = ops.const_value(expr)
    if array.size == 1:
        return expr
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return ops.const(array.reshape(_image(array.shape)).transpose(TO_LAST), str(array.dtype))


def choose_layout(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with spatial operators in NHWC / HWIO, and how many operators and conversions that took."""
    layout = _Layout()
    for p in module["main"].params:
        layout.logical[p] = p
    outside = {str(n) for n in (module["main"].attrs or {}).get("hawq.float_tail", [])}

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        old = binding.value
        if binding.var.name not in outside and _is_view(old, binding.var):
            layout.seen_from[binding.var] = old.args[0]
            return rebuild.env.get(old.args[0], old.args[0])
        handler = _handler(ops.op_name(old)) if binding.var.name not in outside else None
        made = handler(layout, rebuild, binding, old) if handler is not None else None
        if made is not None:
            layout.count += 1
            new, is_last = made
            var = rebuild.emit(new, binding.var.name)
            (layout.last if is_last else layout.logical)[binding.var] = var
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
    made = relax.op.nn.conv2d(
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
    )
    # TVM takes half a millisecond to infer what is known.
    n, c, h, w = ops.shape_of(call)
    kind = relax.TensorType((n, h, w, c), ops.dtype_of(call))
    return relax.Call(made.op, made.args, attrs=made.attrs, ret_ty=kind), True


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
    rank = _rank(call.args[0])
    if str(call.attrs.pad_mode) != "constant" or not (rank == 4 or layout.is_last(call.args[0])):
        return None
    width = [0] * 8
    for axis, before, after in zip(AXES[rank], call.attrs.pad_width[0::2], call.attrs.pad_width[1::2], strict=True):
        width[2 * axis : 2 * axis + 2] = int(before), int(after)
    return relax.op.nn.pad(layout.to_last(rebuild, call.args[0]), width, "constant", call.attrs.pad_value), True


def _rank(expr: relax.Expr) -> int:
    return len(ops.shape_of(expr))


def _elementwise(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    name, rank = ops.op_name(call), _rank(binding.var)
    tensors = (
        list(call.args[0].fields) if name == "hawq.requantize" else [a for a in call.args if isinstance(a, relax.Var)]
    )
    tensors = [t for t in tensors if isinstance(t, relax.Var)]
    if not any(layout.is_last(t) for t in tensors) or any(_rank(t) not in (0, rank) for t in tensors):
        return None

    def convert(arg: relax.Expr) -> relax.Expr:
        if isinstance(arg, relax.Var):
            return layout.to_last(rebuild, arg) if _rank(arg) else layout.to_logical(rebuild, arg)
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([convert(f) for f in arg.fields])
        return _last_constant(arg, rank) if ops.is_const(arg) else arg

    args = [convert(call.args[0]), *call.args[1:]] if reads_tables(name) else [convert(a) for a in call.args]
    return relax.Call(call.op, args, attrs=call.attrs, ty_args=call.ty_args), True


def _concat(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    fields = list(call.args[0].fields)
    if not any(layout.is_last(f) for f in fields):
        return None
    rank = _rank(binding.var)
    parts = [layout.to_last(rebuild, f) if isinstance(f, relax.Var) else _last_constant(f, rank) for f in fields]
    return relax.op.concat(parts, _axis(call, rank)), True


def _axis(call: relax.Call, rank: int) -> int:
    return AXES[rank][int(call.attrs.axis) % rank]


def _reduce(function: Callable[..., relax.Expr]) -> Handler:
    def handler(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
        if not layout.is_last(call.args[0]):
            return None
        places = AXES[_rank(call.args[0])]
        axes = [int(a) % len(places) for a in (call.attrs.axis if call.attrs.axis is not None else range(len(places)))]
        keep = bool(call.attrs.keepdims)
        remaining = [p for a, p in enumerate(places) if a not in axes]
        # Without keepdims the axes that remain must still be in the model's order.
        if not keep and sorted(remaining) != remaining:
            return None
        reduced = [places[a] for a in axes] + [HEIGHT] * (not keep and len(places) == 3)
        return function(layout.to_last(rebuild, call.args[0]), reduced, keep), keep

    return handler


def _argument(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]) or call.attrs.axis is None or not bool(call.attrs.keepdims):
        return None
    function = relax.op.argmax if ops.op_name(call) == "relax.argmax" else relax.op.argmin
    return function(layout.to_last(rebuild, call.args[0]), _axis(call, _rank(binding.var)), True), True


def _softmax(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]):
        return None
    a, rank = call.attrs, _rank(binding.var)
    qtype = arith.QType(int(a["qmin"]), int(a["qmax"]), str(a["out_dtype"]))
    return ops.softmax(
        layout.to_last(rebuild, call.args[0]),
        ops.const_value(call.args[1]),
        axis=AXES[rank][int(a["axis"]) % rank],
        multiplier=int(a["multiplier"]),
        shift=int(a["shift"]),
        qtype=qtype,
        zero_point=int(a["zero_point"]),
        rounding=str(a["rounding"]),
        fixed="bound" in a,
    ), True


def _layer_norm(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]):
        return None
    norm = norm_of(call.attrs, ops.shape_of(call.args[0]))
    axes = [AXES[_rank(binding.var)][int(a)] for a in call.attrs["axes"]]
    return ops.layer_norm(layout.to_last(rebuild, call.args[0]), axes, norm), True


def _strided_slice(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]):
        return None
    places = AXES[_rank(binding.var)]
    axes = [places[int(f.value) % len(places)] for f in call.args[1].fields]
    rest = [[int(f.value) for f in a.fields] for a in call.args[2:]]
    return relax.op.strided_slice(layout.to_last(rebuild, call.args[0]), axes, *rest), True


def _take(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    if not layout.is_last(call.args[0]) or call.attrs.axis is None or _rank(call.args[1]) != 1:
        return None
    data = layout.to_last(rebuild, call.args[0])
    return relax.op.take(data, call.args[1], _axis(call, _rank(binding.var))), True


def _permute_dims(layout: _Layout, rebuild: Rebuild, binding: relax.VarBinding, call: relax.Call) -> Made:
    source = call.args[0]
    if not layout.is_last(source) or source in layout.logical:
        return None
    rank = _rank(source)
    axes = [int(a) for a in call.attrs.axes] if call.attrs.axes is not None else list(reversed(range(rank)))
    composed = [AXES[rank][a] for a in axes]
    if rank == 3:
        return layout.signal(rebuild, source, [max(0, p - HEIGHT) for p in composed]), False
    last = layout.to_last(rebuild, source)
    return (last if composed == [0, 1, 2, 3] else relax.op.permute_dims(last, composed)), False


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
    "hawq.layer_norm": _layer_norm,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.permute_dims": _permute_dims,
}


def _handler(name: str) -> Handler | None:
    return _elementwise if kind_of(name) is Kind.ELEMENTWISE else _HANDLERS.get(name)

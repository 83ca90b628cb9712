"""TE stages of a layer: one emitter per integer operator, the arithmetic of ARITHMETIC.md restated as TIR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hawq_tvm.core import arith, ops
from hawq_tvm.core.errors import StageError
from schedules.layer import Layer

from .half import narrowed, rounded, widened

Index = Sequence[Any]
Array = np.ndarray[Any, Any]


class Operand:
    """A tensor inside a layer: a TE stage, or a constant that becomes an immediate or a placeholder.

    A constant whose elements are all equal is an immediate; any other is passed to the kernel as an argument.
    addend, bits: every element is the one of `tensor` divided by 2^bits, which is exact, plus the addend, a constant
    that is broadcast over the last dimension.  narrow: the same elements in int16, where they fit.  reach: no element
    is larger; 0 where only the type tells.
    """

    def __init__(
        self,
        scope: Emission,
        tensor: te.Tensor | None = None,
        value: Array | None = None,
        addend: Operand | None = None,
        bits: int = 0,
        narrow: te.Tensor | None = None,
        reach: int = 0,
    ) -> None:
        self.scope, self._tensor, self.value = scope, tensor, value
        self.addend, self.bits, self.narrow, self.reach = addend, bits, narrow, reach
        self.uniform = value is not None and value.size > 0 and bool(np.all(value == value.flat[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The static shape."""
        return self.value.shape if self.value is not None else tuple(int(d) for d in self._placed.shape)

    @property
    def dtype(self) -> str:
        """The element type."""
        return str(self.value.dtype) if self.value is not None else str(self._placed.dtype)

    @property
    def _placed(self) -> te.Tensor:
        assert self._tensor is not None
        return self._tensor

    @property
    def tensor(self) -> te.Tensor:
        """The TE tensor; a constant becomes an argument of the kernel when this is first asked for."""
        if self._tensor is None:
            assert self.value is not None
            self._tensor = self.scope.argument(self.value)
        if self.addend is not None or self.bits:
            return te.compute(self._tensor.shape, lambda *i: self.at(i), name="finished")
        return self._tensor

    def without_addend(self) -> Operand:
        """The elements before the addend."""
        return Operand(self.scope, self._tensor, bits=self.bits)

    def unfinished(self) -> Operand:
        """The tensor that lacks the addend and has the bits too many."""
        return Operand(self.scope, self._tensor)

    def at(self, index: Index) -> tirx.Expr:
        """The element at `index`, this operand broadcast to the index's rank as NumPy does."""
        if self.uniform and self.value is not None:
            return tirx.const(self.value.flat[0].item(), self.dtype)
        shape = self.shape
        own = [0 if n == 1 else i for n, i in zip(shape, list(index)[len(index) - len(shape) :], strict=True)]
        if self._tensor is None:
            return self.tensor(*own)
        element = self._tensor(*own)
        element = element >> immediate(self.bits, self.dtype) if self.bits else element
        return element + self.addend.at(own[-1:]) if self.addend is not None else element


Emitter = Callable[["Emission", relax.Call], "te.Tensor | list[te.Tensor] | Operand"]
EMITTERS: dict[str, Emitter] = {}


def emitter(*names: str) -> Callable[[Emitter], Emitter]:
    """Register a function as the emitter of the named operators."""

    def register(function: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(names, function))
        return function

    return register


class Emission:
    """A layer written as TE stages.

    overrides: emitters that a rule brings for some operators, instead of those registered here.  given: what the first
    parameters are, where they are no inputs of the kernel.
    inputs: placeholders of the layer's other parameters.  arguments: extra placeholders and the arrays they stand for.
    """

    def __init__(
        self,
        layer: Layer,
        overrides: Mapping[str, Emitter] | None = None,
        given: Callable[[Emission], Sequence[Operand]] = lambda _: (),
    ) -> None:
        self.layer, self.overrides = layer, overrides or {}
        self.arguments: list[tuple[te.Tensor, Array]] = []
        self.values: dict[relax.Var, Operand | list[Operand]] = {}
        self.names: dict[relax.Var, str] = {}
        self.inputs: list[te.Tensor] = []
        operands = list(given(self))
        for i, p in enumerate(layer.func.params[len(operands) :]):
            self.inputs.append(te.placeholder(ops.shape_of(p), ops.dtype_of(p), f"x{i}"))
            operands.append(Operand(self, self.inputs[-1]))
        self.values.update(zip(layer.func.params, operands, strict=True))
        for b in layer.bindings:
            self._bind(b)
        self.results: list[te.Tensor] = []
        for operand in self.operands(layer.func.body.body):
            self.results.append(self._result(operand))
        used = _placeholders(self.results)
        self.arguments = [(t, a) for t, a in self.arguments if any(t.same_as(u) for u in used)]

    def _bind(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if isinstance(value, relax.Tuple):
            self.values[binding.var] = [self.operand(f) for f in value.fields]
        elif isinstance(value, relax.TupleGetItem):
            self.values[binding.var] = self.operands(value.tuple_value)[value.index]
        elif isinstance(value, relax.Var) or ops.is_const(value):
            self.values[binding.var] = self._lookup(value)
        else:
            name = ops.op_name(value)
            emit = self.overrides.get(name) or EMITTERS.get(name)
            if emit is None:
                raise StageError("no emitter for this operator", where=self.layer.name, found=name or str(type(value)))
            out = emit(self, value)
            if isinstance(out, list):
                self.values[binding.var] = [Operand(self, t) for t in out]
            else:
                self.values[binding.var] = out if isinstance(out, Operand) else Operand(self, out)

    def _lookup(self, expr: relax.Expr) -> Operand | list[Operand]:
        if ops.is_const(expr):
            return Operand(self, value=ops.const_value(expr))
        if isinstance(expr, relax.TupleGetItem):
            return self.operands(expr.tuple_value)[int(expr.index)]
        return self.values[expr]

    def _result(self, operand: Operand) -> te.Tensor:
        """The stage of a result; one that is a parameter or a constant, or appears twice, is copied."""
        if operand.value is not None or any(operand.tensor.same_as(t) for t in [*self.inputs, *self.results]):
            return te.compute(operand.shape, lambda *i: operand.at(i), name="copy")
        return operand.tensor

    def operand(self, expr: relax.Expr) -> Operand:
        """The operand of a tensor expression."""
        value = self._lookup(expr)
        assert isinstance(value, Operand), "a tuple where a tensor is expected"
        return value

    def operands(self, expr: relax.Expr) -> list[Operand]:
        """The operands of a tuple expression; a tensor is a tuple of one."""
        if isinstance(expr, relax.Tuple):
            return [self.operand(f) for f in expr.fields]
        value = self._lookup(expr)
        return value if isinstance(value, list) else [value]

    def tuple_fields(self, expr: relax.Expr) -> list[relax.Expr]:
        """The expressions in a tuple expression."""
        return list(self.layer.definition(expr).fields)

    def argument(self, value: Array, name: str = "") -> te.Tensor:
        """A placeholder for an array that `main` passes to the kernel."""
        tensor = te.placeholder(value.shape, str(value.dtype), name or f"c{len(self.arguments)}")
        self.arguments.append((tensor, np.ascontiguousarray(value).reshape(value.shape)))
        return tensor

    def prim_func(self, *more: te.Tensor) -> tirx.PrimFunc:
        """The unscheduled PrimFunc: inputs, then constant arguments, then more, then results."""
        return te.create_prim_func([*self.inputs, *(t for t, _ in self.arguments), *more, *self.results])


def _placeholders(results: Sequence[te.Tensor]) -> list[te.Tensor]:
    """The placeholders that some results are computed from."""
    seen: dict[Any, te.Tensor] = {}
    queue = list(results)
    while queue:
        tensor = queue.pop()
        if tensor.op not in seen:
            seen[tensor.op] = tensor
            queue.extend(tensor.op.input_tensors)
    return [t for op, t in seen.items() if isinstance(op, te.PlaceholderOp)]


def out_shape(call: relax.Call) -> tuple[int, ...]:
    """The static shape of a call's result."""
    return ops.shape_of(call)


def immediate(value: Any, dtype: str) -> tirx.Expr:
    """A scalar constant."""
    return tirx.const(value, dtype)


def clamp(value: tirx.Expr, low: Any, high: Any, dtype: str) -> tirx.Expr:
    """min(max(value, low), high)."""
    return tirx.Min(tirx.Max(value, immediate(low, dtype)), immediate(high, dtype))


def ints(values: Any) -> list[int]:
    """A TVM array of integers as Python integers."""
    return [int(v) for v in values]


# Element-wise operators --------------------------------------------------------------------------------------------

_BINARY: dict[str, Callable[[tirx.Expr, tirx.Expr], tirx.Expr]] = {
    "relax.add": lambda a, b: a + b,
    "relax.subtract": lambda a, b: a - b,
    "relax.multiply": lambda a, b: a * b,
    "relax.maximum": tirx.Max,
    "relax.minimum": tirx.Min,
    "relax.greater": tirx.GT,
    "relax.greater_equal": tirx.GE,
    "relax.less": tirx.LT,
    "relax.less_equal": tirx.LE,
    "relax.equal": tirx.EQ,
    "relax.not_equal": tirx.NE,
    "relax.logical_and": lambda a, b: tirx.And(a.astype("bool"), b.astype("bool")),
    "relax.logical_or": lambda a, b: tirx.Or(a.astype("bool"), b.astype("bool")),
    "relax.logical_xor": lambda a, b: tirx.NE(a.astype("int8"), b.astype("int8")),
}


@emitter(*_BINARY)
def _binary(e: Emission, call: relax.Call) -> te.Tensor:
    a, b = (e.operand(x) for x in call.args)
    operator = _BINARY[ops.op_name(call)]
    return te.compute(out_shape(call), lambda *i: operator(a.at(i), b.at(i)), name=ops.op_name(call)[6:])


@emitter("relax.logical_not")
def _logical_not(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    return te.compute(x.shape, lambda *i: tirx.Not(x.at(i).astype("bool")), name="logical_not")


@emitter("relax.where")
def _where(e: Emission, call: relax.Call) -> te.Tensor:
    c, a, b = (e.operand(x) for x in call.args)
    return te.compute(out_shape(call), lambda *i: tirx.Select(c.at(i).astype("bool"), a.at(i), b.at(i)), name="where")


@emitter("relax.clip")
def _clip(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    low, high = (int(a.value) for a in call.args[1:])
    return te.compute(x.shape, lambda *i: clamp(x.at(i), low, high, x.dtype), name="clip")


@emitter("relax.astype")
def _astype(e: Emission, call: relax.Call) -> te.Tensor:
    x, dtype = e.operand(call.args[0]), ops.dtype_of(call)
    return te.compute(x.shape, lambda *i: x.at(i).astype(dtype), name="astype")


@emitter("hawq.lookup")
def _lookup(e: Emission, call: relax.Call) -> te.Tensor:
    """(A16)"""
    x, table = e.operand(call.args[0]), e.operand(call.args[1])
    low = np.iinfo(x.dtype).min
    return te.compute(x.shape, lambda *i: table.at([x.at(i).astype("int32") - low]), name="lookup")


@emitter("hawq.interpolate")
def _interpolate(e: Emission, call: relax.Call) -> te.Tensor:
    """(A31)"""
    u, table = e.operand(call.args[0]), e.operand(call.args[1])
    cell, second, first, last = (immediate(int(call.attrs[n]), "int32") for n in ("cell", "second", "first", "last"))
    half = 1 << int(call.attrs["cell"]) >> 1

    def element(*i: Any) -> tirx.Expr:
        where = u.at(i)
        value, slope, curvature = (table.at([row, where >> cell]) for row in range(3))
        place = (where & immediate(2 * half - 1, "int32")) - immediate(half, "int32")
        return (value + (((slope + ((curvature * place) >> second)) * place) >> first)) >> last

    return te.compute(u.shape, element, name="interpolate")


# The border --------------------------------------------------------------------------------------------------------


def fence(value: tirx.Expr) -> tirx.Expr:
    """The value, kept from being fused with the next operation into one that rounds once (a fused multiply-add)."""
    return tirx.call_llvm_pure_intrin(str(value.ty.dtype), "llvm.arithmetic.fence", value)


_REAL_ROUNDINGS: dict[str, Callable[[tirx.Expr], tirx.Expr]] = {
    "floor": tirx.floor,
    "ceil": tirx.ceil,
    "toward_zero": tirx.trunc,
    "away": lambda value: tirx.Select(value < immediate(0, str(value.ty.dtype)), tirx.floor(value), tirx.ceil(value)),
}


def round_real(value: tirx.Expr, dtype: str, rounding: str) -> tirx.Expr:
    """A real number rounded to an integer, still in its float type."""
    if rounding == "half_even":
        return tirx.nearbyint(value)
    value = fence(value)
    if rounding in _REAL_ROUNDINGS:
        return _REAL_ROUNDINGS[rounding](value)
    zero, half, one = (immediate(v, dtype) for v in (0, 0.5, 1))
    negative, whole = value < zero, tirx.trunc(value)
    rest = tirx.Select(negative, whole - value, value - whole)
    outward = tirx.Select(negative, whole - one, whole + one)
    above, reached = rest > half, rest >= half
    if rounding == "half_up":
        return tirx.Select(tirx.Select(negative, above, reached), outward, whole)
    if rounding in ("half_away", "half_toward_zero"):
        return tirx.Select(reached if rounding == "half_away" else above, outward, whole)
    raise ValueError(f"rounding {rounding!r} does not apply to real numbers")


def quantize_element(
    x: tirx.Expr,
    scale: tirx.Expr,
    zero_point: tirx.Expr,
    low: int,
    high: int,
    storage: str,
    rounding: str = "half_even",
    form: str = "divide",
    through: str = "",
) -> tirx.Expr:
    """(A2) or (A2a) for one element in the type of `scale`, which is its reciprocal in the form of that name."""
    real = str(scale.ty.dtype)
    x = rounded(widened(x), through)
    integer = "int64" if storage == "int32" else "int32"
    ratio = x.astype(real) * scale if form == "reciprocal" else x.astype(real) / scale
    zero = zero_point.astype(integer)
    if form in arith.HALVES:
        ratio = rounded(ratio.astype("float32"), form).astype(real)
    if form == "affine":
        ratio, zero = ratio + zero.astype(real), immediate(0, integer)
    least = (immediate(low, integer) - zero).astype(real)
    most = (immediate(high, integer) - zero).astype(real)
    bounded = tirx.Min(tirx.Max(round_real(ratio, real, rounding), least), most)
    return (bounded.astype(integer) + zero).astype(storage)


@emitter("hawq.quantize")
def _quantize(e: Emission, call: relax.Call) -> te.Tensor:
    """(A2)"""
    attrs = call.attrs
    storage, form = str(attrs["out_dtype"]), str(attrs["form"])
    real = np.float64 if storage == "int32" else np.float32
    values: Array = ops.const_value(call.args[1]).astype(real)
    x, zero = e.operand(call.args[0]), e.operand(call.args[2])
    scale = Operand(e, value=real(1) / values if form == "reciprocal" else values)
    low, high, rounding, through = int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["rounding"]), str(attrs["through"])

    def element(*i: Any) -> tirx.Expr:
        return quantize_element(x.at(i), scale.at(i), zero.at(i), low, high, storage, rounding, form, through)

    return te.compute(out_shape(call), element, name="quantize")


@emitter("hawq.dequantize")
def _dequantize(e: Emission, call: relax.Call) -> te.Tensor:
    """(A1): an exact integer difference, then one product in the type of the scale, then the type of the result."""
    x, scale, zero = (e.operand(a) for a in call.args)
    through, dtype = str(call.attrs["through"]), str(call.attrs["out_dtype"])
    wide = "int64" if x.dtype in ("int32", "uint32", "int64") else "int32"

    def element(*i: Any) -> tirx.Expr:
        difference = x.at(i).astype(wide) - zero.at(i).astype(wide)
        real = (difference.astype(scale.dtype) * scale.at(i)).astype("float32")
        return narrowed(real, dtype) if dtype != "float32" else rounded(real, through)

    return te.compute(out_shape(call), element, name="dequantize")


@emitter("hawq.dynamic_quantize")
def _dynamic_quantize(e: Emission, call: relax.Call) -> list[te.Tensor]:
    """(A2b)"""
    x = e.operand(call.args[0]).tensor
    axes = [te.reduce_axis((0, int(d))) for d in x.shape]
    zero = immediate(0, "float32")
    lowest = te.compute((1,), lambda _: te.min(x(*axes), axis=axes), name="lowest") if axes else None
    axes = [te.reduce_axis((0, int(d))) for d in x.shape]
    highest = te.compute((1,), lambda _: te.max(x(*axes), axis=axes), name="highest") if axes else None

    def low() -> tirx.Expr:
        return tirx.Min(lowest[0] if lowest is not None else x(), zero)

    def high() -> tirx.Expr:
        return tirx.Max(highest[0] if highest is not None else x(), zero)

    def scale_of() -> tirx.Expr:
        span = (high() - low()) / immediate(255, "float32")
        return tirx.Select(span > zero, span, immediate(1, "float32"))

    scale = te.compute((), scale_of, name="scale")

    def zero_point_of() -> tirx.Expr:
        return clamp(tirx.nearbyint((zero - low()) / scale()), 0, 255, "float32").astype("uint8")

    zero_point = te.compute((), zero_point_of, name="zero_point")
    data = te.compute(
        x.shape, lambda *i: quantize_element(x(*i), scale(), zero_point(), 0, 255, "uint8"), name="quantize"
    )
    return [data, scale, zero_point]

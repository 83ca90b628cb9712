"""What the lowering knows about a float tensor: which integers stand for it, and with which real numbers.

A `Real` is  sum_i (data_i - zero_i) * scale_i + constant,  clipped to low .. high, where data_i are integer tensors
that exist in the new module. Scales, zeros and constants are NumPy arrays that broadcast against the tensor; scales,
constants and bounds are exact: Fractions of what the file holds, so that nothing is rounded before a requantize is
proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.errors import ModelError, StageError
from hawq_tvm.core.intervals import Interval, constant
from hawq_tvm.core.operators import interval_of, partial_sums

from .exact import nearest, negative, rational

Array = NDArray[Any]
INFINITY = float("inf")
# Scales and real constants are exact numbers of Python's: more of them would take minutes and gigabytes.
LARGEST = 1 << 20
NOTHING = Interval.of_range(0, 0)


class NotLowered(ModelError):
    """A float operation that no integer operation stands for."""

    def __init__(self, where: str, op: str, reason: str, remedy: str) -> None:
        super().__init__(reason, where=where, found=op, remedy=remedy)
        self.op = op

    def about(self, node: str) -> NotLowered:
        """The same, as it is told of a node of the user's model."""
        return NotLowered(node, self.op, f"cannot be integer: {self.message}", self.remedy)


def bound(value: Fraction | float) -> Fraction | float:
    """A bound of a clip: exact, or infinite."""
    return value if abs(value) == INFINITY else Fraction(value)


@dataclass(frozen=True, eq=False)
class Term:
    """(data - zero) * scale: one integer tensor and its real meaning; the scale becomes Fractions whatever it is
    given as.

    accumulator: the data is the 32 or 64-bit sum of a convolution, product or pool, so an integer bias belongs to it.
    half: of the positive (1) or negative part (-1) of a tensor, that tensor's mark and which part; elsewhere it is 0.
    off: how far data - zero can be at most, in its own units, from what the model's own numbers make (A10a).
    signed: whether a 0 of the model's float tensor has the scale's sign, by which something divided by it is infinite.
    near: whether its integers are fixed-point values or made of such, whose 0 may stand for what is none.
    """

    data: relax.Expr
    zero: Array
    scale: Array
    accumulator: bool = False
    half: tuple[object, int] | None = None
    off: Fraction = Fraction(0)
    signed: bool = False
    near: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", rational(self.scale))


@dataclass(frozen=True, eq=False)
class Real:
    """A float tensor inside the integer region; see the module's docstring.

    through: a 16-bit float that an output is rounded to, and kind: in which type it is returned then.
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    constant: Array = field(default_factory=lambda: np.zeros(()))
    low: Fraction | float = -INFINITY
    high: Fraction | float = INFINITY
    through: str = ""
    kind: str = "float32"

    def __post_init__(self) -> None:
        """Constants never enlarge a tensor: its shape is that of its integers, and every constant fits into it.

        Raises StageError where that does not hold, which would change shapes silently.
        """
        shapes = [ops.shape_of(t.data) for t in self.terms]
        if shapes and np.broadcast_shapes(*shapes) != tuple(self.shape):
            raise StageError(
                "has integers of another shape than its tensor", expected=str(list(self.shape)), found=str(shapes)
            )
        object.__setattr__(self, "terms", tuple(_fitted_term(t, tuple(self.shape)) for t in self.terms))
        object.__setattr__(self, "constant", fitted(rational(self.constant), self.shape))

    @property
    def clipped(self) -> bool:
        """Whether a ReLU or clip is still to be applied."""
        return self.low > -INFINITY or self.high < INFINITY


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant float tensor: plain values (floats, or Fractions), or integers (zero point taken away) times a
    scale.

    rounded: whether the integers stand for floats nearly, as the weights of `fixed.summand` do; off: of others that
    do, the most that the roundings of one sum's add up to, in units.
    """

    stored: Array
    scale: Array | None = None
    rounded: bool = False
    off: float = 0.0

    @property
    def values(self) -> Array:
        """What is stored, bytes in 32 bits: room for what follows, and made anew for each reader, for all weights at
        once take long to be given memory.
        """
        return self.stored.astype(np.int32) if self.stored.dtype in (np.int8, np.uint8) else self.stored

    @property
    def real(self) -> Array:
        """The values, exactly: floats as they are, else Fractions."""
        return (
            self.values if self.scale is None else np.asarray(self.values.astype(object) * rational(self.scale), object)
        )

    @property
    def doubles(self) -> Array:
        """The values, each rounded to float64 once: products of 29 bits and a float32 scale are exact there."""
        scale = None if self.scale is None else np.asarray(self.scale)
        if scale is None or scale.dtype not in (np.float32, np.float16) or self._beyond(1 << 29):
            return self.real.astype(np.float64)
        return np.asarray(self.values.astype(np.float64) * scale.astype(np.float64))

    def _beyond(self, most: int) -> bool:
        return self.stored.size > 0 and bool(np.max(self.stored) >= most or np.min(self.stored) <= -most)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.stored.shape)


@dataclass(frozen=True, eq=False)
class Curve:
    """A non-linear function of every element of a tensor, which becomes a table at its quantize (A16), (A27).

    function: of the elements of `leaf`, a `functions.Function`.
    """

    shape: tuple[int, ...]
    leaf: Real
    function: Any


@dataclass(frozen=True, eq=False)
class Joined:
    """Tensors whose integers can be joined only once they share a scale, that is at their quantize: a monotone
    operation on their elements, with which rounding commutes.

    join: makes the integer result from the parts' integers.  moved: whether it moves them too.  axis: along which
    they are only set side by side.  picks: whether every element of the result is one of the parts' elements,
    whatever their values.  size: how many parts are joined in all, a part that is joined twice counting twice.
    depth: how many joins lie within one another.
    """

    shape: tuple[int, ...]
    parts: tuple[Real | Joined | Constant | Curve | Softmax | Quotient, ...]
    join: Callable[[list[relax.Expr]], relax.Expr]
    moved: bool = False
    axis: int | None = None
    picks: bool = True
    size: int = field(init=False)
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        inner = [p for p in self.parts if isinstance(p, Joined)]
        object.__setattr__(self, "size", len(self.parts) - len(inner) + sum(p.size for p in inner))
        object.__setattr__(self, "depth", 1 + max((p.depth for p in inner), default=0))


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax waiting for its quantize, which alone knows the output scale (A17).

    fraction: bits of the grid of powers of two that the term is on (A24); 0 where it is on the model's own.
    """

    shape: tuple[int, ...]
    term: Term
    axis: int
    fraction: int = 0


@dataclass(frozen=True, eq=False)
class Quotient:
    """A tensor divided by another, clipped to low .. high, waiting for its quantize, which rounds it once (A32).

    The zero points of both are 0 and their scales no 0.
    """

    shape: tuple[int, ...]
    dividend: Term
    divisor: Term
    low: Fraction | float = -INFINITY
    high: Fraction | float = INFINITY


@dataclass(frozen=True, eq=False)
class Moved:
    """A float graph input after operations that only move elements: they commute with the input's quantize.

    ends: what the input saturates at, where the user has declared its range.
    """

    base: relax.Expr
    moves: tuple[relax.Call, ...] = ()
    ends: tuple[float, float] | None = None


# What waits for its quantize, one tensor or several, and what stands for a float tensor at all.
ALONE = (Softmax, Curve, Quotient)
WAITING = (Joined, *ALONE)
TENSORS = (Real, *WAITING)
# One of relax.Expr, Constant, Moved and TENSORS: TVM's classes are invisible to the type checker.
Value = Any


class Context:
    """The new module under construction: emits integer operators and knows the interval of every result."""

    def __init__(self, builder: relax.BlockBuilder, taken: Iterable[str] = ()) -> None:
        self.builder = builder
        self._emit = ops.Emitter(builder, taken)
        self.intervals: dict[relax.Var, Any] = {}
        self.layer = ""
        # Whether GELU, softmax and LayerNorm are computed as I-BERT does.
        self.ibert = False
        # Whether what the current layer needs may be approximated: a quantize or an output in fixed point is to come.
        self.feeding = False
        # Whether no quantize is, so that nothing bounds what functions give.
        self.ending = False
        # The integers of what several readers ask for at one scale.
        self.realized: dict[Any, relax.Expr] = {}

    def emit(self, expr: relax.Expr, suffix: str = "") -> relax.Expr:
        """Bind `expr` to a variable named after the current layer (plus `.suffix` for an intermediate value)."""
        if isinstance(expr, relax.Var) or ops.is_const(expr):
            return expr
        var = self._emit(self._flat(expr, suffix), self._name(suffix))
        value = self.builder.lookup_binding(var)
        if isinstance(value, relax.Call):
            self.intervals[var] = interval_of(value, [self.interval(a) for a in value.args])
        elif isinstance(value, relax.TupleGetItem):
            whole = self.interval(value.tuple_value)
            self.intervals[var] = whole[value.index] if isinstance(whole, tuple) else whole
        return var

    def _name(self, suffix: str) -> str:
        return f"{self.layer}.{suffix}" if suffix else self.layer

    def _flat(self, expr: relax.Expr, suffix: str) -> relax.Expr:
        """A call whose own calls (casts of its operands) are bound, so that they have an interval."""
        if not isinstance(expr, relax.Call) or not any(isinstance(a, relax.Call) for a in expr.args):
            return expr
        args = [
            self.emit(a, f"{suffix}.cast" if suffix else "cast") if isinstance(a, relax.Call) else a for a in expr.args
        ]
        return relax.Call(expr.op, args, attrs=expr.attrs, ty_args=expr.ty_args)

    def emit_float(self, expr: relax.Expr) -> relax.Var:
        """Bind a float operator of a head or tail to a variable named after the current layer; integers can be any."""
        var = self._emit(expr, self.layer)
        if not stages.is_float(var):
            self.intervals[var] = Interval.of_range(*arith.RANGES.get(ops.dtype_of(var), (0, 1)))
        return var

    def interval(self, expr: relax.Expr) -> Any:
        """The interval of an expression already emitted, of a constant, or a tuple of them."""
        if isinstance(expr, relax.Tuple):
            return tuple(self.interval(f) for f in expr.fields)
        if isinstance(expr, relax.Var):
            return NOTHING if stages.is_float(expr) else self.intervals[expr]
        if ops.is_const(expr) and not stages.is_float(expr):
            return constant(ops.const_value(expr))
        return NOTHING

    def bounds(self, expr: relax.Expr) -> tuple[Array, Array]:
        """The lowest and highest values of an integer tensor, as arrays that broadcast against it."""
        interval = self.interval(expr)
        return np.asarray(interval.low), np.asarray(interval.high)

    def accumulate(self, make: Callable[[str], relax.Expr], suffix: str) -> relax.Expr:
        """Emit `make("int32")`, or `make("int64")` when the computed bounds leave int32."""
        narrow = self.builder.normalize(self._flat(make("int32"), suffix))
        args = [self.interval(a) for a in narrow.args]
        result = interval_of(narrow, args)
        low, high = partial_sums(narrow, args, result).scalar
        if low < arith.RANGES["int32"][0] or high > arith.RANGES["int32"][1]:
            return self.emit(make("int64"), suffix)
        var = self._emit(narrow, self._name(suffix))
        self.intervals[var] = result
        return var

    def fail(self, op: str, reason: str, remedy: str) -> NotLowered:
        """The error for the current layer; to be raised."""
        return NotLowered(self.layer, op.removeprefix("relax.").removeprefix("nn."), reason, remedy)


def fitted(array: Array, shape: tuple[int, ...]) -> Array:
    """A constant as it broadcasts into a tensor of `shape`: of no higher rank, a scalar where it has one element.

    Raises StageError when it would enlarge the tensor.
    """
    array = np.asarray(array)
    if array.size == 1:
        return array.reshape(())
    extra = max(0, array.ndim - len(shape))
    inner = array.reshape(array.shape[extra:]) if all(n == 1 for n in array.shape[:extra]) else array
    if inner.ndim > len(shape) or np.broadcast_shapes(inner.shape, shape) != tuple(shape):
        raise StageError(
            "has a constant that does not fit its tensor",
            expected=f"a shape that broadcasts to {list(shape)}",
            found=str(list(array.shape)),
        )
    return inner


def _fitted_term(term: Term, shape: tuple[int, ...]) -> Term:
    zero, scale = fitted(term.zero, shape), fitted(term.scale, shape)
    return (
        term
        if (np.shape(zero), np.shape(scale)) == (np.shape(term.zero), np.shape(term.scale))
        else replace(term, zero=zero, scale=scale)
    )


INSERT = "quantize this tensor too (a quantize/dequantize pair before this node)"


def is_uniform(array: Array) -> bool:
    """Whether an array holds one value only."""
    return array.size == 1 or bool(np.all(array == array.flat[0]))


def compress(array: Array) -> Array:
    """An equal array in broadcasting: every axis along which nothing changes is shrunk to 1."""
    array = np.asarray(array)
    for axis in range(array.ndim):
        first = np.take(array, [0], axis)
        # What changes at once is not compared as a whole: Fractions take long.
        if array.shape[axis] > 1 and np.array_equal(first, np.take(array, [1], axis)):
            array = first if np.array_equal(np.broadcast_to(first, array.shape), array) else array
    return array.reshape(()) if array.size == 1 else array


def broadcast_rank(array: Array, rank: int) -> Array:
    """`array` with leading axes of size 1 added up to `rank`."""
    array = np.asarray(array)
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def whole(ctx: Context, term: Term, shape: tuple[int, ...], suffix: str = "whole") -> Term:
    """A term whose integers have this shape: those of a smaller one are repeated, as broadcasting would."""
    if ops.shape_of(term.data) == tuple(shape):
        return term
    return replace(term, data=ctx.emit(relax.op.broadcast_to(term.data, shape), suffix))


def widened(ctx: Context, value: Value, shape: tuple[int, ...]) -> Value:
    """`value` repeated to a larger shape, where an operator's constant has more elements than its tensor."""
    if tuple(value.shape) == tuple(shape):
        return value
    if isinstance(value, Real):
        first, *others = value.terms
        return replace(value, shape=shape, terms=(whole(ctx, first, shape), *others))
    return Joined(shape, (value,), lambda parts: relax.op.broadcast_to(parts[0], shape), moved=True)


def summed(term: Term) -> Term:
    """A term of a float sum, in which a 0 is positive where any addend's is."""
    return replace(term, signed=term.signed and not np.any(negative(term.scale)))


def with_integer_bias(value: Real) -> Real:
    """(A11): the constant added to an accumulator rounded to its grid, for operators that read the integers; others
    unchanged.
    """
    term = value.terms[0] if len(value.terms) == 1 else None
    if term is None or not term.accumulator or not np.any(value.constant) or np.any(term.scale == 0):
        return value
    zero = np.asarray(term.zero - nearest(value.constant / term.scale), object)
    if np.max(np.abs(zero)) > arith.RANGES["int32"][1]:
        return value
    return replace(value, terms=(replace(term, zero=zero.astype(np.int64)),), constant=np.zeros(()))


def with_bias(ctx: Context, term: Term) -> Term:
    """An accumulator whose zero, the negated bias, has been added to the integers; other terms unchanged."""
    if not term.accumulator or not np.any(term.zero):
        return term
    bias = -np.asarray(term.zero, np.int64)
    data = ctx.accumulate(lambda dtype: _add(term.data, bias, dtype), "bias")
    return replace(term, data=data, zero=np.zeros((), np.int64))


def _add(data: relax.Expr, bias: Array, dtype: str) -> relax.Expr:
    wide = "int64" in (dtype, ops.dtype_of(data)) or np.any(np.abs(bias) > arith.RANGES["int32"][1])
    kind = "int64" if wide else "int32"
    if ops.dtype_of(data) != kind:
        data = relax.op.astype(data, kind)
    return relax.op.add(data, ops.const(bias, kind))


def from_dequantize(data: relax.Expr, scale: Array, zero: Array, shape: tuple[int, ...]) -> Real:
    """The Real of a dequantized integer tensor."""
    return Real(shape, (Term(data, compress(zero).astype(np.int64), compress(scale), signed=True),))


def integer_constant(values: Array) -> relax.Expr:
    """A constant of the narrowest signed type that holds the values, but at least int16 where they are in that."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    kinds = ("int8", "int16", "int32", "int64")[values.dtype == np.int16 :]
    dtype = next(d for d in kinds if arith.RANGES[d][0] <= low and high <= arith.RANGES[d][1])
    return ops.const(values, dtype)

"""How far a layer's integers can be from the real formula of its inputs, where that is bounded and not enumerated.

A normalization (A25) is near its real value, not equal to it, and so are a softmax (A17), a fixed-point value (A26), a
function of a grid (A27), (A31) and all of I-BERT's arithmetic (A28)-(A30). What reads such integers hands the distance
on; a requantize turns it into steps of its result, where it ends: what the next layer reads are integers as the model
quantizes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, division, ibert, ibert_ops, ops, softmax_wide, stages
from hawq_tvm.core.errors import ModelError, StageError
from hawq_tvm.core.intervals import Interval, constant
from hawq_tvm.core.layer_norm import norm_of
from hawq_tvm.core.operators import Kind, interval_of, kind_of


def distances(packed: tvm.IRModule) -> dict[str, float]:
    """For every layer near the real formula, by name: d with |y - real| <= 1/2 + d in steps of its result, unless
    clamped.

    Where d is below 1, the result is at most one step from the real formula rounded.
    """
    return both(packed)[0]


def both(packed: tvm.IRModule) -> tuple[dict[str, float], dict[str, float]]:
    """What `distances` gives, and for every float tensor that such a layer ends in, an output in fixed point, how far
    it can be from the real formula before float32 rounds it, a real number.
    """
    walk = _Walk(packed)
    main = packed["main"]
    ranges = zip(main.params, stages.input_ranges(main), strict=True)
    walk.function(main, {p: _Near(0.0, Interval.of_range(low, high)) for p, (low, high) in ranges}, "")
    return walk.found, walk.ends


@dataclass(frozen=True)
class _Near:
    """A tensor's distance from its real value, in its own units, which i-GELU has for every channel; and its integers'
    bounds.
    """

    distance: Any
    interval: Interval

    def one(self) -> _Near:
        """The same with one distance for all channels."""
        return _Near(float(np.max(self.distance)), self.interval)

    @property
    def most(self) -> float:
        """The largest magnitude."""
        return float(max(map(abs, self.interval.scalar)))


_NOWHERE = _Near(0.0, Interval.of_range(0, 0))
_UNIT = Interval.of_range(-1, 1)


class _Walk:
    """The distance of every tensor from its real value."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.found: dict[str, float] = {}
        self.ends: dict[str, float] = {}

    def function(self, func: relax.Function, near: dict[relax.Var, Any], layer: str) -> Any:
        for b in stages.bindings(func):
            near[b.var] = self._of(b.value, near, layer or b.var.name)
        return self._of(func.body.body, near, layer)

    def _of(self, expr: relax.Expr, near: dict[relax.Var, Any], layer: str) -> Any:
        if isinstance(expr, relax.Var):
            return near[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._of(f, near, layer) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            whole = self._of(expr.tuple_value, near, layer)
            return whole[expr.index] if isinstance(whole, tuple) else whole
        if ops.is_const(expr):
            return _NOWHERE if stages.is_float(expr) else _Near(0.0, constant(ops.const_value(expr)))
        if not isinstance(expr, relax.Call):
            return _NOWHERE
        args = [self._of(a, near, layer) for a in expr.args]
        if isinstance(expr.op, tvm.ir.GlobalVar):
            func = self.module[expr.op]
            name = str((func.attrs or {}).get("hawq.layer", layer))
            return self.function(func, dict(zip(func.params, args, strict=True)), name)
        if kind_of(ops.op_name(expr)) is None or not isinstance(expr.ty, relax.TensorType):
            return _whole(expr.ty)
        inner = [tuple(v.interval for v in a) if isinstance(a, tuple) else a.interval for a in args]
        interval = _NOWHERE.interval if stages.is_float(expr) else _interval(expr, inner)
        return _Near(self._call(expr, args, inner, layer), interval)

    def _call(self, call: relax.Call, args: list[Any], inner: list[Any], layer: str) -> Any:
        name = ops.op_name(call)
        flat = [v.one() for a in args for v in (a if isinstance(a, tuple) else (a,))]
        # Integers of 32 bits are on their way to a quantize, and hand their distance on; so do probabilities of 15.
        wide = not stages.is_float(call) and ops.dtype_of(call) in ("int32", "int64")
        if name == "hawq.layer_norm":
            norm = norm_of(call.attrs, ops.shape_of(call.args[0]))
            return (norm.distance + norm.moved(flat[0].distance)) * 2.0**norm.fraction
        if name in ibert_ops.POLYNOMIALS:
            return _polynomial(call, flat[0].distance)
        if name == "hawq.i_layer_norm":
            return ibert.normalized_distance(ibert_ops.row_length(call))
        if name in ("hawq.softmax", "hawq.softmax_wide", "hawq.i_softmax"):
            # What is rounded down lies up to a step below, not half a step.
            distance = _softmax(call, flat[0].distance) + 0.5 * (str(call.attrs.get("rounding", "")) == "floor")
            return 0.5 + distance if wide or "bound" in call.attrs else self._note(layer, distance)
        if name == "hawq.lookup" and ("bound" in call.attrs or flat[0].distance):
            distance = _looked_up(call, flat[0].distance)
            return 0.5 + distance if wide else self._note(layer, distance)
        if name == "hawq.interpolate":
            # (A31), and what the distance of a grid's integer makes of it, its rounding included.
            return 0.5 + float(call.attrs["bound"]) + flat[0].distance * float(call.attrs["slope"])
        if name == division.NAME:
            distance = _divided(call, flat) + 0.5 * (str(call.attrs["rounding"]) in arith.DIRECTED)
            if wide:
                return 0.5 + distance
            return self._note(layer, distance) if "bound" in call.attrs or flat[0].distance or flat[1].distance else 0.0
        if name == "hawq.requantize":
            return self._requantize(call, args[0], layer, wide)
        if name == "hawq.quantize" and _is_grid(call):
            return 0.5
        if name == "hawq.dequantize":
            real = flat[0].distance * float(np.max(np.abs(ops.const_value(call.args[1]))))
            self.ends[layer] = max(self.ends.get(layer, 0.0), real + float(call.attrs.get("bound", 0.0)))
            return 0.0
        if not any(v.distance for v in flat) and not _has_rounded_weights(call):
            return 0.0
        if name == "relax.multiply":
            a, b = flat
            return a.most * b.distance + b.most * a.distance + a.distance * b.distance
        if name in ("relax.add", "relax.subtract"):
            return flat[0].distance + flat[1].distance
        if name in ("relax.nn.conv2d", "relax.matmul"):
            return _summed_products(call, flat, inner)
        if name in ("relax.sum", "hawq.sum_pool2d"):
            return flat[0].distance * max(map(abs, _interval(call, [_UNIT]).scalar))
        if name in _DECIDING:
            return 0.0
        if kind_of(name) is Kind.MOVEMENT or name in _PASSING:
            return max((v.distance for v in flat), default=0.0)
        raise StageError("has no rule for how far it is from the real formula", where=layer, found=name)

    def _requantize(self, call: relax.Call, data: tuple[_Near, ...], layer: str, wide: bool) -> float:
        attrs, near = call.attrs, any(np.any(v.distance) for v in data)
        if "bound" in attrs and int(attrs["thresholds"]) < 0:
            # Too many operands to compare thresholds: what the dyadic numbers lose at most is known.
            directed = 0.5 * (str(attrs["rounding"]) in arith.DIRECTED)
            return self._note(layer, _rescaled(call, data) + float(attrs["bound"]) + directed)
        if "bound" in attrs:
            # Onto a grid or a fixed point: what the dyadic numbers lose is in the bound. A table knows its grid's.
            return _rescaled(call, data) + (0.5 + float(attrs["bound"]) if wide else 0.0)
        if not near:
            return 0.0
        distance = _rescaled(call, data) + _lost(call, data)
        return distance + 1.0 if wide else self._note(layer, distance)

    def _note(self, layer: str, distance: float) -> float:
        """Where a quantize ends what was near: the next layer reads integers as the model has them.

        Raises ModelError where nothing bounds the distance.
        """
        if not math.isfinite(distance):
            raise ModelError(
                "has no bound on its distance from the real formula",
                where=layer,
                found="a divisor that may be 0 where its real value is not",
                remedy="quantize what it divides by (a quantize/dequantize pair before this node)",
            )
        self.found[layer] = max(self.found.get(layer, 0.0), distance)
        return 0.0


def _is_grid(call: relax.Call) -> bool:
    """Whether a float input becomes a fixed-point value (A26a)."""
    exponents = np.log2(ops.const_value(call.args[1]).astype(np.float64))
    return ops.dtype_of(call) == "int32" and bool(np.all(exponents == np.rint(exponents)))


# The results of these are no further off than what they choose from, or keep.
_PASSING = frozenset(
    f"relax.{n}" for n in ("maximum", "minimum", "clip", "where", "astype", "max", "min", "nn.max_pool2d")
)
# Truth values and places: no number that a distance would describe.
_DECIDING = frozenset(
    f"relax.{n}"
    for n in (
        *("greater", "greater_equal", "less", "less_equal", "equal", "not_equal", "argmax", "argmin"),
        *("logical_and", "logical_or", "logical_xor", "logical_not"),
    )
)


def _interval(call: relax.Call, args: list[Any]) -> Interval:
    found = interval_of(call, args)
    assert isinstance(found, Interval)
    return found


def _whole(kind: Any) -> Any:
    if isinstance(kind, relax.TupleType):
        return tuple(map(_whole, kind.fields))
    bounds = arith.RANGES.get(str(getattr(kind, "dtype", "")), (0, 1))
    return _Near(0.0, Interval.of_range(*bounds))


def _has_rounded_weights(call: relax.Call) -> bool:
    """Whether the weights of a product are the lower part of a float constant, in int16 beside 32-bit data (A26)."""
    if ops.op_name(call) not in ("relax.nn.conv2d", "relax.matmul"):
        return False
    data, weight = call.args[:2]
    return ops.is_const(weight) and ops.dtype_of(weight) == "int16" and ops.dtype_of(data) == "int32"


def _summed_products(call: relax.Call, sides: list[_Near], inner: list[Any]) -> float:
    """Distances of both sides times what they are multiplied with, and half a unit of weights that were rounded."""
    (a, b), total = sides, 0.0
    rounded = b.distance + 0.5 * _has_rounded_weights(call)
    for intervals, distance in (
        ([_UNIT, inner[1]], a.distance),
        ([inner[0], _UNIT], rounded),
        ([_UNIT, _UNIT], a.distance * rounded),
    ):
        total += distance * max(map(abs, _interval(call, intervals).scalar)) if distance else 0.0
    return total


def _looked_up(call: relax.Call, distance: float) -> float:
    """(A27e), and what a grid's integer that is not exact makes of it: it may be in as many cells more.

    An exact table knows no slope: the largest of its own steps, and half a step of its rounding, are one.
    """
    cells = math.ceil(distance) + 1 if distance else 0
    if cells and "slope" not in call.attrs:
        table = ops.const_value(call.args[1]).astype(np.int64)
        return float(call.attrs.get("bound", 0.0)) + cells * (float(np.max(np.abs(np.diff(table)))) + 1)
    return float(call.attrs.get("bound", 0.0)) + cells * float(call.attrs.get("slope", 0.0))


def _polynomial(call: relax.Call, off: float) -> Any:
    """(A28e), and 1.13 of what the operand is off by: neither erf nor GELU is anywhere steeper, in real numbers."""
    corner, constant = (ops.const_value(a).astype(np.float64) for a in call.args[1:3])
    own = np.reshape([float(d) for d in call.attrs["distance"]], corner.shape)
    # The scale of the operand over that of the result: 2 C' for GELU, and C' S for erf, where S B is about 1.769.
    steep = 2 * constant if len(call.args) == 4 else constant * 1.77 / corner
    return own + off * 1.13 * (steep + 1) / 2.0 ** int(call.attrs["shift"])


def _softmax(call: relax.Call, off: float) -> float:
    """(A17e), (A29e), or (A24e) for scores that are off by so much on their grid."""
    multiplier, shift = int(call.attrs["multiplier"]), int(call.attrs["shift"])
    count = ops.shape_of(call.args[0])[int(call.attrs["axis"])]
    if ops.op_name(call) == "hawq.i_softmax":
        scale, finer = float(call.attrs["scale"]), off * 2.0 ** int(call.attrs["left"])
        return ibert.softmax_distance(scale, count, multiplier / 2.0**shift, shift, finer)
    if ops.op_name(call) == "hawq.softmax_wide":
        return softmax_wide.distance(count, multiplier / 2.0**shift, shift, int(call.attrs["fraction"]), max(off, 1.0))
    return multiplier / 2.0**shift * (count + 3) * 2.0**-31 + 2.0**-shift


def _divided(call: relax.Call, sides: list[_Near]) -> float:
    """(A32d): what its ratio is off by, and what its operands are, beside the divisor's least magnitude."""
    a, b = sides[:2]
    if not a.distance and not b.distance:
        return float(call.attrs.get("bound", 0.0))
    low, high = b.interval.scalar
    least = max(low, -high, 0) - b.distance
    m, d = (ops.const_value(c).astype(np.float64) for c in call.args[2:])
    zero = int(call.attrs["zero_point"])
    furthest = max(abs(int(call.attrs[n]) - zero) for n in ("qmin", "qmax")) + 1
    moved = float(np.max(np.abs(m) / d)) * a.distance + furthest * b.distance
    apart = float(call.attrs["apart"])
    return moved / least * (1 + apart) + furthest * apart if least > 0 else math.inf


def _rescaled(call: relax.Call, near: tuple[_Near, ...]) -> float:
    """The distances of the operands in steps of the result."""
    _, multipliers, _, shift = call.args
    unit = 2.0 ** -ops.const_value(shift).astype(np.float64)
    total = np.zeros(())
    for m, v in zip(multipliers.fields, near, strict=True):
        total = total + np.abs(ops.const_value(m).astype(np.float64)) * v.distance * unit
    return float(np.max(total))


def _lost(call: relax.Call, near: tuple[_Near, ...]) -> float:
    """What the dyadic numbers lose (A3), in steps: half a unit of each multiplier and of the offset.

    A multiplier of 1 is exact: the second of two steps (A23a).
    """
    unit = 2.0 ** -ops.const_value(call.args[3]).astype(np.float64)
    rounded = [not np.all(ops.const_value(m) == 1) for m in call.args[1].fields]
    return float(np.max(unit)) * (0.5 + sum(v.most for v, r in zip(near, rounded, strict=True) if r) / 2)

"""Computed intervals of every integer tensor of a module (A21), and the margin that each accumulator keeps.

They hold for every input whatever. An accumulator that could leave its type is an error here, at compile time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any

import numpy as np
import tvm
from tvm import relax

from . import arith, division, ibert_ops, interpolation, ops, stages
from .errors import OverflowBoundError
from .interpolation import Steps
from .intervals import Interval, constant, requantize_worst
from .layer_norm import norm_of
from .operators import OPERATORS, interval_of, partial_sums

_NO_VALUE = Interval.of_range(0, 0)
_REMEDIES = {
    **{kind: "quantize its operands to fewer bits" for kind in ("add", "subtract", "multiply")},
    "astype": "put a Clip before it",
}


@dataclass(frozen=True)
class LayerMargin:
    """The room one accumulator leaves.

    layer: the user's layer.  kind: the operator.  dtype: the accumulator's type ("int64" for the sum inside a
    requantize).
    worst: the largest magnitude that can occur, one less on the negative side.  limit: worst must be below it.
    """

    layer: str
    kind: str
    dtype: str
    worst: int
    limit: int

    @property
    def spare_bits(self) -> float:
        """log2(limit / worst): 1.0 means the worst case could double."""
        return log2(self.limit / max(self.worst, 1))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**asdict(self), "spare_bits": round(self.spare_bits, 2)}


def module_ranges(module: tvm.IRModule) -> dict[str, Interval]:
    """The interval of every integer binding of `main` by name, for INTEGER and PACKED modules.

    Raises OverflowBoundError like `margins`: intervals after an overflow would mean nothing.
    """
    return _walked(module).named


def margins(module: tvm.IRModule) -> list[LayerMargin]:
    """The margin of every accumulator and requantize of an INTEGER or PACKED module, in order of execution.

    Raises OverflowBoundError naming the first layer whose worst case does not fit.
    """
    return _walked(module).margins


def _walked(module: tvm.IRModule) -> _Walk:
    walk = _Walk(module)
    walk.run()
    return walk


class _Walk:
    """Intervals of every binding of `main`, calls of private functions walked into; margins as they are met."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.named: dict[str, Interval] = {}
        self.margins: list[LayerMargin] = []

    def run(self) -> None:
        main = self.module["main"]
        ranges = zip(main.params, stages.input_ranges(main), strict=True)
        env = {p: Interval.of_range(low, high) for p, (low, high) in ranges}
        self._function(main, env, self.named.__setitem__, "", stages.float_tail(main))

    def _function(
        self,
        func: relax.Function,
        env: dict[relax.Var, Any],
        record: Callable[[str, Any], None],
        layer: str,
        outside: set[str],
    ) -> Any:
        for b in stages.bindings(func):
            is_float = stages.is_float(b.var) and not isinstance(b.var.ty, relax.TupleType)
            if b.var.name in outside or is_float:
                # What a float head rounds to integers can be any of them.
                env[b.var] = Interval.of_range(*stages.range_of_type(ops.dtype_of(b.var), b.var.name))
                continue
            env[b.var] = self._expr(b.value, env, layer or b.var.name)
            if isinstance(env[b.var], Interval):
                record(b.var.name, env[b.var])
        return self._expr(func.body.body, env, layer)

    def _expr(self, expr: relax.Expr, env: dict[relax.Var, Any], layer: str) -> Any:
        if isinstance(expr, relax.Var):
            return env[expr]
        if ops.is_const(expr):
            return _NO_VALUE if stages.is_float(expr) else constant(ops.const_value(expr))
        if isinstance(expr, relax.Tuple):
            return tuple(self._expr(f, env, layer) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._expr(expr.tuple_value, env, layer)[expr.index]
        if not isinstance(expr, relax.Call):
            return _NO_VALUE
        args = [self._expr(a, env, layer) for a in expr.args]
        if isinstance(expr.op, tvm.ir.GlobalVar):
            func = self.module[expr.op]
            return self._function(func, dict(zip(func.params, args, strict=True)), lambda *_: None, layer, set())
        result = interval_of(expr, args)
        self._measure(expr, args, result, layer)
        return result

    def _measure(self, call: relax.Call, args: list[Any], result: Any, layer: str) -> None:
        """Note the margins of a call, and check them."""
        name = ops.op_name(call)
        if name == "hawq.requantize":
            if str(call.attrs["rounding"]) == "double":
                self._margin(LayerMargin(layer, "requantize left shift", "int32", _left_shifted(call, args[0]), 2**31))
            self._margin(LayerMargin(layer, "requantize", "int64", requantize_worst(call, args[0]), 2**63))
        elif name in ("hawq.softmax", "hawq.softmax_wide"):
            self._margin(LayerMargin(layer, "softmax", "int64", _softmax_worst(call), 2**63))
        elif name == "hawq.interpolate":
            worst = interpolation.worst(ops.const_value(call.args[1]), Steps.of(call.attrs))
            self._margin(LayerMargin(layer, "interpolate", "int32", worst, 2**31))
        elif name == division.NAME:
            self._margin(LayerMargin(layer, "divide", "int64", division.worst(call, *args[:2]), 2**63))
        elif name == "hawq.layer_norm":
            self._margin(LayerMargin(layer, "layer_norm", "int64", _layer_norm_worst(call, args[0]), 2**63))
        elif name in ibert_ops.NAMES:
            self._margin(LayerMargin(layer, *ibert_ops.worst(call, args[0])))
        elif OPERATORS[name].grows or name == "relax.astype":
            bound = partial_sums(call, args, result)
            if isinstance(bound, Interval) and not stages.is_float(call):
                self._fits(call, bound, name.split(".")[-1], layer)

    def _fits(self, call: relax.Call, bound: Interval, kind: str, layer: str) -> None:
        dtype = ops.dtype_of(call)
        (low, high), (least, most) = bound.scalar, _bounds(dtype)
        # -2^31 itself fits int32, so a negative value counts one less; below zero an unsigned type has no room at all.
        worst = max(high, -low - 1 if least < 0 or low >= 0 else most + 1 - low)
        if kind != "astype" or worst > most:
            self._margin(LayerMargin(layer, kind, dtype, worst, most + 1))

    def _margin(self, margin: LayerMargin) -> None:
        self.margins.append(margin)
        if margin.worst >= margin.limit:
            raise OverflowBoundError(
                f"the result of its {margin.kind} can leave {margin.dtype}",
                where=margin.layer,
                expected=f"a worst case below {margin.limit}",
                found=str(margin.worst),
                remedy=_REMEDIES.get(margin.kind, "use fewer bits, a shorter sum, or smaller weights in this layer"),
            )


def _bounds(dtype: str) -> tuple[int, int]:
    return (0, 1) if dtype == "bool" else arith.RANGES[dtype]


def _left_shifted(call: relax.Call, data: Sequence[Interval]) -> int:
    """The largest |x| 2^max(0, 31 - s) of (A8), which gemmlowp holds in 32 bits."""
    low, high = data[0].scalar
    return max(high, -low - 1) << max(0, 31 - int(np.min(ops.const_value(call.args[3]))))


def _softmax_worst(call: relax.Call) -> int:
    """The largest number inside (A17): a product e_i R, R at most 2 M, and half of 2^(k + bits of the sum)."""
    attrs = call.attrs
    count = ops.shape_of(call.args[0])[int(attrs["axis"])]
    bits = (count << arith.SOFTMAX_BITS).bit_length()
    return (int(attrs["multiplier"]) << arith.SOFTMAX_BITS + 1) + (1 << int(attrs["shift"]) + bits - 1)


def _layer_norm_worst(call: relax.Call, x: Interval) -> int:
    """The largest number inside (A25): n sum q^2, the variance with epsilon, or a product D R and half its divisor."""
    norm, (low, high) = norm_of(call.attrs, ops.shape_of(call.args[0])), x.scalar
    n, reach = norm.count, max(high - norm.zero_point, norm.zero_point - low, 0)
    spread = ((n * (high - low)) ** 2) // 4 if norm.centered else (n * reach) ** 2
    widest = ((spread << norm.shift) if norm.shift >= 0 else spread >> -norm.shift) + norm.epsilon
    furthest = (n - 1) * (high - low) if norm.centered else n * reach
    # The reciprocal is below 2^31 + 1, and the divisor has no more than 61 - H + 16 bits.
    half = 1 << min(61, 61 - norm.fraction + max(0, 1 - norm.shift // 2))
    return max((n * reach) ** 2, widest, (furthest << 31) + half)

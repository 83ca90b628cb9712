"""Float inputs that an operator reads without a quantize of its own, as the residual sum of a network whose layers
quantize them: fixed-point values whose range the user declares, or quantizes of the same tensor tell (A26a), (A26b).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops, stages

from .exact import nearest, rational
from .movement import MOVES
from .rescale import Output
from .values import Array, Context, Moved, Real, Term, is_uniform

# Of them 24 within that range, as float32 has; with more, the multipliers beside it keep few bits (A4).
BITS = 28
# How far beyond what the model's own quantizes hold an input may go before it saturates.
ROOM = 16
_PASSED_ON = (*MOVES, "relax.astype")


def reaches(main: relax.Function) -> dict[relax.Var, float]:
    """The largest magnitude that some quantize holds of a float tensor, behind constant factors, addends and movement,
    by variable.
    """
    values = {b.var: b.value for b in stages.bindings(main)}
    found: dict[relax.Var, float] = {}
    for var, value in reversed(values.items()):
        name = ops.op_name(value)
        args: Sequence[relax.Expr] = value.args if name else ()
        most: float | None
        if name == "hawq.quantize":
            most = _held(value)
        elif name in ("relax.multiply", "relax.divide", "relax.add", "relax.subtract") and var in found:
            constant = _constant(args[1], values)
            most = None if constant is None else _before(name, found[var], constant)
        else:
            most = found.get(var) if name in _PASSED_ON else None
        if most is not None and isinstance(args[0], relax.Var):
            found[args[0]] = max(found.get(args[0], 0.0), most)
    return found


def _constant(expr: relax.Expr, values: dict[relax.Var, relax.Expr]) -> Array | None:
    value = values.get(expr, expr) if isinstance(expr, relax.Var) else expr
    if ops.op_name(value) == "hawq.dequantize" and ops.is_const(value.args[0]):
        data, scale, zero = (ops.const_value(a).astype(np.float64) for a in value.args)
        product: Array = (data - zero) * scale
        return product
    return ops.const_value(value).astype(np.float64) if ops.is_const(value) else None


def _held(call: relax.Call) -> float:
    """The largest magnitude between the ends of a quantize."""
    scale, zero = (ops.const_value(a).astype(np.float64) for a in call.args[1:3])
    return float(max(np.max(np.abs((int(call.attrs[end]) - zero) * scale)) for end in ("qmin", "qmax")))


def _before(name: str, most: float, constant: Array) -> float | None:
    """What a tensor can be of which a sum or product with a constant is at most so large."""
    magnitudes = np.abs(constant)
    if name == "relax.multiply":
        return most / float(magnitudes.min()) if magnitudes.size and magnitudes.min() > 0 else None
    return most * float(magnitudes.max()) if name == "relax.divide" else most + float(magnitudes.max(initial=0.0))


def as_integers(ctx: Context, value: Moved, reach: float) -> Real:
    """(A26a), (A26b): a float input by the border's quantize, of a scale of a power of two that holds its declared
    range, or ROOM times `reach` where it has none.
    """
    out = Output.fixed_point(ROOM * reach if value.ends is None else max(map(abs, value.ends)), BITS)
    qtype = out.qtype
    if value.ends is not None:
        low, high = nearest(rational(value.ends) / out.scale)
        qtype = arith.QType(int(low), int(high), qtype.storage)
    data = ctx.emit(ops.quantize(value.base, float(out.scale.flat[0]), 0, qtype=qtype), "input")
    return Real(ops.shape_of(value.base), (Term(data, np.zeros((), np.int64), out.scale, near=True),))


def narrowed(call: relax.Call, source: relax.Expr, low: float, high: float) -> relax.Call | None:
    """(A12) a quantize of `source` in place of that of its clip to low .. high; None where these are not the same
    integer in every channel.
    """
    attrs, (scale, zero) = call.attrs, (ops.const_value(a) for a in call.args[1:])
    qtype = arith.QType(int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["out_dtype"]))
    how = {key: str(attrs[key]) for key in ("rounding", "form", "through")}
    levels = []
    for bound in (low, high):
        level = arith.quantize(
            np.full(scale.shape, bound, np.float32),
            scale,
            zero,
            qmin=qtype.qmin,
            qmax=qtype.qmax,
            storage=qtype.storage,
            **how,
        )
        if not is_uniform(level):
            return None
        levels.append(int(level.flat[0]))
    qtype = arith.QType(levels[0], levels[1], qtype.storage)
    return ops.quantize(source, scale, zero, qtype=qtype, branches=str(attrs["branches"]), **how)

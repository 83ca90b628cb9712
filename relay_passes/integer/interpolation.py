"""A function of sums as a fixed-point value: a fine grid, and a polynomial in each of its cells (A31)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np

from hawq_tvm.core import arith, ops
from hawq_tvm.core.crossings import boundary
from hawq_tvm.core.interpolation import interpolated
from hawq_tvm.core.threshold_search import round_exactly

from .curves import SAMPLES, Stepped, attributes, counted, reach, unsaturated
from .functions import Clip, Function
from .polynomials import Limits, Polynomials, polynomials
from .rescale import Output, approximated
from .values import INFINITY, Array, Context, Curve, Real, Term, is_uniform, with_bias

# Bits of a value that a quantize follows at once, and of the grid's integers beyond which nothing is clipped.
BITS = 26
# A bound of so many steps says that the samples have missed a part of the function.
FAR = 1 << 6


def fixed_curve(ctx: Context, curve: Curve, out: Output) -> Real | None:
    """(A31): the fixed-point value of a function of sums, which `out` quantizes or, if it is one, asks for.

    What saturates in `out` need not be right, and may be infinite. None where the function's slope has no bound.
    """
    whole = reach(ctx, curve.leaf)
    limits = (-INFINITY, INFINITY) if out.fixed else _saturated(out)
    made = _chosen(curve.function, whole, limits, out)
    if made is None:
        return None
    grid, leaf, scale = made.grid, curve.leaf, made.scale
    onto = Output(np.asarray(grid.step, object), 0, arith.QType(0, grid.last, "int32"), "half_up", "affine")
    least, most = onto.bounds(*(v if abs(v) == INFINITY else v - grid.origin for v in (leaf.low, leaf.high)))
    onto = replace(onto, qtype=arith.QType(int(least), int(most), "int32"))
    terms = tuple(with_bias(ctx, t) for t in leaf.terms)
    call, rescales, which = approximated(ctx, terms, leaf.constant - grid.origin, onto)
    counts: dict[str, int] = {}
    if not out.fixed and is_uniform(out.scale):
        levels = _levels(made, onto.qtype, out)
        zero = -grid.origin / grid.step
        counts = attributes(counted(Stepped(curve.function, out), whole, rescales, which, levels, grid.step, zero))
    data = ctx.emit(
        ops.interpolate(ctx.emit(call, "grid"), made.table, made.steps, bound=made.bound, slope=made.slope, **counts),
        "" if out.fixed else "fixed",
    )
    return Real(curve.shape, (Term(data, np.zeros((), np.int64), np.asarray(scale, object), near=True),))


def _saturated(out: Output) -> tuple[Fraction, Fraction]:
    """Real numbers beyond which every channel's result is clamped."""
    ends = [(q - out.level) * s for q in (out.qtype.qmin - 1, out.qtype.qmax + 1) for s in out.scale.flat]
    return min(ends), max(ends)


def _largest(limits: Limits) -> float:
    return max(abs(float(v)) for v in limits)


def _chosen(function: Function, whole: tuple[float, float], limits: Limits, out: Output) -> Polynomials | None:
    """The polynomials between the points where the result saturates; where the samples have missed a part of the
    function, over the whole range.
    """
    if out.fixed:
        bounded, fine = function, out
    else:
        bounded = function.then(Clip(*limits))
        fine = Output.fixed_point(_largest(limits), BITS)
    made = None
    for ends in (unsaturated(Stepped(bounded, fine), *whole), whole):
        if ends[0] < ends[1] and (made is None or made.bound > FAR):
            inside, scale = function, fine.scale.flat[0]
            if not out.fixed:
                edges = np.linspace(*ends, SAMPLES + 1)
                most = max(float(np.max(np.abs(v))) for v in function.bounds(edges[:-1], edges[1:]))
                # What leaves the result's range by far is cut off, for the sake of the bits that are left.
                inside = bounded if not most < 4 * _largest(limits) else function
                scale = fine.scale.flat[0] if inside is bounded else Output.fixed_point(most, BITS).scale.flat[0]
            made = polynomials(inside, limits, ends, whole, scale)
    return made


def _levels(made: Polynomials, kind: arith.QType, out: Output) -> Callable[[Array], Array]:
    """What the grid's integers become, before the zero point is added after the rounding."""
    (first, last), ratio = out.steps, made.scale / out.scale.flat[0]
    rounding = "half_away" if out.rounding == "double" else out.rounding
    starts = []
    for k, edge in zip(range(first, last + 1), boundary(np.arange(first, last + 1), rounding).tolist(), strict=True):
        value = (Fraction(edge) - out.inside) / ratio
        least = -(-value.numerator // value.denominator)
        starts.append(least + (round_exactly(least * ratio + out.inside, rounding) < k))
    table = made.table.astype(np.int64)

    def levels(index: Array) -> Array:
        values = interpolated(np.clip(index, kind.qmin, kind.qmax), table, made.steps)
        return np.asarray(first - 1 + np.searchsorted(np.array(starts), values, "right"))

    return levels

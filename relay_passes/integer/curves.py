"""A function of one tensor becomes a table: of the tensor's own integers (A16), or of a 16-bit grid (A27)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.crossings import boundary, compare, crossings
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.rescales import Rescales
from hawq_tvm.core.threshold_search import round_exactly
from hawq_tvm.core.thresholds import Proof

from .exact import rational
from .functions import Bounds, Clip, Function
from .rescale import Output, approximated
from .values import INFINITY, INSERT, Array, Context, Curve, Real, Term, is_uniform, with_bias

NARROW = ("int8", "uint8", "int16", "uint16")
GRID = arith.QType.of("int16")
# How many values a function is tried at to see where its result saturates.
SAMPLES = 1 << 12
# Steps beyond these saturate in every type, and float64 still tells them apart.
MOST_STEPS = 2.0**40


def tabulated(ctx: Context, curve: Curve, out: Output) -> relax.Expr:
    """The integers of a curve at one scale, from a table."""
    data, table, attrs = table_of(ctx, curve, out)
    return ctx.emit(ops.lookup(data, table, **attrs))


def table_of(ctx: Context, curve: Curve, out: Output) -> tuple[relax.Expr, Array, dict[str, float]]:
    """The integers that index a curve's table, the table, and the attributes of its lookup."""
    term = own_integers(curve.leaf)
    if term is None:
        return _of_sums(ctx, curve, out)
    levels, real, function = _leaf(ctx, curve, term)
    constant = rational(curve.leaf.constant).flat[0]

    def exactly(chosen: Array) -> Array:
        indices = (levels - int(term.zero.flat[0]))[chosen].astype(object)
        return np.asarray(indices * term.scale.flat[0] + constant, object)

    return term.data, _entries(ctx, function, real, exactly, out), {"bound": 0.0} if out.fixed else {}


def own_integers(leaf: Real) -> Term | None:
    """The one 8 or 16-bit tensor of one scale that stands for a leaf, None where there is none."""
    if len(leaf.terms) != 1 or not is_uniform(leaf.constant):
        return None
    (term,) = leaf.terms
    narrow = ops.dtype_of(term.data) in NARROW and ops.shape_of(term.data) == tuple(leaf.shape)
    return term if narrow and is_uniform(term.scale) and is_uniform(term.zero) else None


def check_pole(ctx: Context, curve: Curve) -> None:
    """Raise NotLowered where a function is another at -0 than at 0, as 1 / x is, and its integers do not tell which
    of the two a 0 of the float tensor is.
    """
    at = curve.function(np.array([0.0, -0.0]))
    if at[0] == at[1] or np.isnan(at).all() or np.all(curve.leaf.constant != 0):
        return
    term = own_integers(curve.leaf)
    low, high = reach(ctx, curve.leaf)
    if low <= 0 <= high and not (term is not None and term.signed):
        reason = "it divides by a tensor that may be 0, and its integers do not tell whether that is 0 or -0"
        raise ctx.fail("divide", reason, INSERT)


def _leaf(ctx: Context, curve: Curve, term: Term) -> tuple[Array, Array, Function]:
    """The integers that index the table, their real values, and the function of these."""
    low, high = arith.RANGES[ops.dtype_of(term.data)]
    ends = ctx.bounds(term.data)
    # Levels that cannot occur repeat the nearest that can.
    levels = np.clip(np.arange(low, high + 1), int(np.min(ends[0])), int(np.max(ends[1])))
    real = (levels - int(term.zero.flat[0])) * float(term.scale.flat[0])
    constant = float(rational(curve.leaf.constant).flat[0])
    leaf = curve.leaf
    clip = (Clip(leaf.low, leaf.high),) if leaf.clipped else ()
    return levels, real + constant if constant else real, Function((*clip, *curve.function.stages))


def _entries(ctx: Context, function: Function, x: Array, exactly: Callable[[Array], Array], out: Output) -> Array:
    """(A16): the function of every x, rounded once; exactly: the Fractions that some of x stand for."""
    real = function(x)
    if np.any(np.isnan(real)):
        raise ModelError(
            "its function is not a number for some quantized inputs",
            where=ctx.layer,
            found=f"NaN at x = {float(x[np.isnan(real)][0]):g}",
            remedy="clip the input to where the function is defined",
        )
    scale, inside = out.scale.flat[0], out.inside
    steps = np.clip(real / float(scale), -MOST_STEPS, MOST_STEPS)
    rounded = arith.round_real(steps + inside, out.rounding)
    twice = 2 * (steps + inside)
    unsure = (np.abs(twice - np.rint(twice)) < 1e-9 * (np.abs(twice) + 1)) & (np.abs(steps) < 2.0**30)
    # Functions that are not rational know nothing of Fractions, not even of none.
    if function.rational and unsure.any():
        with suppress(ZeroDivisionError):  # 1 / 0 is infinite in float64, and no fraction
            values = function(exactly(unsure)).tolist()
            rounded[unsure] = [round_exactly(v / scale + inside, out.rounding) for v in values]
    return np.clip(rounded + out.zero, out.qtype.qmin, out.qtype.qmax).astype(out.qtype.storage)


# -- sums ------------------------------------------------------------------------------------------


def reach(ctx: Context, real: Real) -> tuple[float, float]:
    """Bounds of a sum of terms, clipped."""
    low, high = (np.asarray(real.constant).astype(np.float64) for _ in range(2))
    for t in real.terms:
        scale = np.asarray(t.scale).astype(np.float64)
        ends = [(np.asarray(b).astype(np.float64) - t.zero) * scale for b in ctx.bounds(t.data)]
        low, high = low + np.minimum(*ends), high + np.maximum(*ends)
    least, most = float(np.min(low)), float(np.max(high))
    room = 2.0**-45 * max(abs(least), abs(most))
    return tuple(min(max(v, float(real.low)), float(real.high)) for v in (least - room, most + room))  # type: ignore[return-value]


def values_of(ctx: Context, curve: Curve) -> tuple[float, float]:
    """Bounds of a curve's values, perhaps infinite."""
    term = own_integers(curve.leaf)
    if term is not None:
        _, x, function = _leaf(ctx, curve, term)
        real = function(x)
        return (-INFINITY, INFINITY) if np.any(np.isnan(real)) else (float(np.min(real)), float(np.max(real)))
    edges = np.linspace(*reach(ctx, curve.leaf), SAMPLES + 1)
    low, high = curve.function.bounds(edges[:-1], edges[1:])
    return float(np.min(low)), float(np.max(high))


@dataclass(frozen=True)
class Stepped:
    """A function in steps of an output: its values, their bounds, and the integers they become."""

    function: Function
    out: Output

    def levels(self, x: Array) -> Array:
        """The integers, before the zero point is added after the rounding; NaN where the function is not a number."""
        first, last = self.out.steps
        steps = np.clip(self.function(x) / float(self.out.scale.flat[0]), -MOST_STEPS, MOST_STEPS) + self.out.inside
        return np.clip(arith.round_real(steps, self.out.rounding), first - 1, last)

    def bounds(self, low: Array, high: Array) -> Bounds:
        """Bounds of the values over every interval low .. high."""
        ends = self.function.bounds(low, high)
        least, most = (v / float(self.out.scale.flat[0]) + self.out.inside for v in ends)
        with np.errstate(invalid="ignore"):
            return (
                np.where(np.isfinite(least), least - np.abs(least) * 2.0**-50, least),
                np.where(np.isfinite(most), most + np.abs(most) * 2.0**-50, most),
            )

    def widest(self, low: Array, high: Array) -> float:
        """The most by which the function changes, as far as its result does not clamp it, within one interval."""
        first, last = self.out.steps
        least, most = (np.clip(v, first - 1.0, float(last)) for v in self.bounds(low, high))
        return float(np.max(most - least))

    def excess(self, low: Array, high: Array, levels: Array) -> float:
        """How much more than its rounding a level can be wrong by, over intervals low .. high, in steps."""
        least, most = self.bounds(low, high)
        first, last = self.out.steps
        up, down = boundary(levels + 1, self.out.rounding), boundary(levels, self.out.rounding)
        above = np.where(levels >= last, -np.inf, most - up)
        below = np.where(levels < first, -np.inf, down - least)
        return max(0.0, float(np.max(above)), float(np.max(below)))


def _of_sums(ctx: Context, curve: Curve, out: Output) -> tuple[relax.Expr, Array, dict[str, float]]:
    """(A27): the sum on a 16-bit grid between the points where the result saturates, and a table of the grid."""
    low, high = reach(ctx, curve.leaf)
    stepped = Stepped(curve.function, out)
    made = _gridded(ctx, curve.leaf, stepped, unsaturated(stepped, low, high), (low, high))
    # Where the samples have missed a part of the function, the whole range is gridded.
    if made.outside > made.inside:
        made = _gridded(ctx, curve.leaf, stepped, (low, high), (low, high))
    proof = _crossings(stepped, made, low, high)
    attrs = {"bound": max(made.inside, made.outside), "slope": made.slope, **attributes(proof)}
    return ctx.emit(made.call, "grid"), made.table, attrs


def _crossings(stepped: Stepped, made: _Grid, low: float, high: float) -> Proof:
    """The thresholds of the real function of the sums against those of the grid's table."""
    levels = made.table.astype(np.int64) - stepped.out.zero

    def levels_of(index: Array) -> Array:
        return np.asarray(levels[np.clip(index, GRID.qmin, GRID.qmax) - GRID.qmin])

    return counted(stepped, (low, high), made.rescales, made.which, levels_of, made.step, made.zero)


def attributes(proof: Proof) -> dict[str, int]:
    """A proof as the attributes of a call."""
    return {name: getattr(proof, name) if proof.enumerated else -1 for name in ("thresholds", "differing")}


def counted(
    stepped: Stepped,
    whole: tuple[float, float],
    rescales: Rescales,
    which: Array,
    levels_of: Callable[[Array], Array],
    step: Fraction,
    zero: Fraction | int,
) -> Proof:
    """The thresholds of a real function of sums within `whole` against its integers', as `compare` has them."""
    out = stepped.out
    real = None if out.fixed or rescales.given else crossings(stepped.bounds, *whole, out.steps, out.rounding)
    if real is None:
        return Proof(enumerated=False)
    counts = [int(n) for n in np.bincount(which.ravel())]
    return compare(real, rescales, counts, levels_of, step, zero)


@dataclass(frozen=True)
class _Grid:
    """A requantize onto a grid: what it does to every channel, what the grid's integers stand for, and their table.

    inside, outside: how much more than its rounding a result can be wrong by between the grid's ends and beyond them,
    in steps.  slope: by how much it changes within one cell.
    """

    call: relax.Call
    rescales: Rescales
    which: Array
    step: Fraction
    zero: int
    table: Array
    inside: float
    outside: float
    slope: float


def unsaturated(stepped: Stepped, low: float, high: float) -> tuple[float, float]:
    """The part of low .. high beyond which the result seems not to change."""
    while low < high:
        x = np.linspace(low, high, SAMPLES + 1)
        levels = stepped.levels(x)
        changes = np.flatnonzero(levels[1:] != levels[:-1])
        if not changes.size:
            break
        ends = float(x[changes[0]]), float(x[changes[-1] + 1])
        if ends[1] - ends[0] > 0.9 * (high - low):
            return ends
        low, high = ends
    return low, high


def _gridded(
    ctx: Context, leaf: Real, stepped: Stepped, ends: tuple[float, float], whole: tuple[float, float]
) -> _Grid:
    width = (ends[1] - ends[0]) / (GRID.qmax - GRID.qmin) * (1 + 2.0**-40)
    step = Fraction(width if width > 0 else max(abs(ends[0]), 1.0) * 2.0**-20)
    zero = GRID.qmin - round(Fraction(ends[0]) / step)
    grid = Output(np.asarray(step, object), zero, GRID, "half_up", "affine")
    bounds = grid.bounds(leaf.low, leaf.high)
    narrowed = replace(grid, qtype=arith.QType(int(bounds[0]), int(bounds[1]), GRID.storage))
    terms = tuple(with_bias(ctx, t) for t in leaf.terms)
    call, rescales, which = approximated(ctx, terms, leaf.constant, narrowed)
    half = float((Fraction(1, 2) + rescales.off()) * step) * (1 + 2.0**-40)

    index = np.arange(GRID.qmin, GRID.qmax + 1) - zero
    x = np.clip(index * float(step), *whole)
    out = stepped.out
    table = _entries(ctx, stepped.function, x, lambda chosen: index[chosen].astype(object) * step, out)
    levels = table.astype(np.int64) - out.zero
    near = (np.clip(x - half, *whole), np.clip(x + half, *whole))
    inside = stepped.excess(*near, levels)
    outside = 0.0
    for start, end, level in ((whole[0], near[0][0], levels[0]), (near[1][-1], whole[1], levels[-1])):
        if start < end:
            edges = np.linspace(start, end, SAMPLES + 1)
            outside = max(outside, stepped.excess(edges[:-1], edges[1:], np.full(SAMPLES, level)))
    return _Grid(call, rescales, which, step, zero, table, inside, outside, stepped.widest(*near))

"""(A31): a function of sums as one polynomial of the second degree in each cell of a fine grid, with a proven bound.

Coefficients are Taylor's at the middle of a cell, the slope mended by what the cubic term does to it on the whole
cell (Chebyshev). The bound holds for every real number: from jets, and from the integers that the table really has.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hawq_tvm.core.interpolation import Steps, interpolated

from .functions import Array, Bounds, Clip, Function
from .jets import jet_of

Limits = tuple[Fraction | float, Fraction | float]
# Bits of the grid, cells, bits of what a product may be, and pieces of a cell or of what lies beyond the cells.
GRID_BITS, FEWEST_CELLS, MOST_CELLS, PRODUCT_BITS, PIECES, BEYOND = 26, 1 << 8, 1 << 13, 30, 64, 1 << 12
# Nothing is gained by a polynomial nearer than this many steps: the value is rounded to whole ones.
ENOUGH = 0.5
# Bends are looked for in so many intervals at first, at most so many at once, halved so often.
FIRST, MOST_BENDS, HALVINGS = 251, 1 << 6, 40


@dataclass(frozen=True)
class Grid:
    """Cells of equal width: integer u stands for origin + u step.  cell: the bits of a place within one."""

    origin: Fraction
    step: Fraction
    cells: int
    cell: int

    @property
    def last(self) -> int:
        """The greatest integer of the grid."""
        return (self.cells << self.cell) - 1

    def real(self, u: Array) -> Array:
        """What integers stand for, in float64."""
        return float(self.origin) + np.asarray(u, np.float64) * float(self.step)


@dataclass(frozen=True, eq=False)
class Polynomials:
    """A grid and its table, and the scale of what they give.

    bound: how far a result before its rounding can be from the function of what the grid's integer stands for, in
    steps of the result.  slope: by how much the function can change from one integer to the next.
    """

    grid: Grid
    table: Array
    steps: Steps
    scale: Fraction
    bound: float
    slope: float


def bends(function: Function, low: float, high: float) -> list[float]:
    """Where the function has a bend inside low .. high, nearly; nothing where it has very many."""
    edges = np.linspace(low, high, FIRST + 1)
    lows, highs = edges[:-1], edges[1:]
    for _ in range(HALVINGS):
        bent = ~np.isfinite(jet_of(function, lows, highs)[2][1])
        lows, highs = lows[bent], highs[bent]
        if not 0 < lows.size <= MOST_BENDS:
            return []
        middle = lows + (highs - lows) / 2
        lows, highs = np.concatenate([lows, middle]), np.concatenate([middle, highs])
    found: list[float] = []
    for x in sorted(lows.tolist()):
        if low < x < high and (not found or x - found[-1] > (high - low) * 1e-6):
            found.append(x)
    return found


def fitted_grid(low: float, high: float, bent: list[float], cells: int) -> Grid:
    """A grid over low .. high with the first and the last bend at boundaries between its cells."""
    width, start = (high - low) * (1 + 2.0**-30) / cells, low
    if bent:
        width = (high - low) * (1 + 2.0**-30) / (cells - 2)
        between = int((bent[-1] - bent[0]) / width)
        width = (bent[-1] - bent[0]) / between if between else width
        start = bent[0] - int(np.ceil((bent[0] - low) / width)) * width
    cell = GRID_BITS - (cells.bit_length() - 1)
    step = Fraction(width) / (1 << cell)
    # A boundary lies half a step below the first integer of its cell.
    return Grid(Fraction(start) + step / 2, step, cells, cell)


def polynomials(
    function: Function, limits: Limits, ends: tuple[float, float], whole: tuple[float, float], scale: Fraction
) -> Polynomials | None:
    """The function between `ends` in steps of `scale`, and, constant, beyond them where sums within `whole` lie there.

    limits: real numbers beyond which all values are as good as another.
    None where a bound of its slope is not known.
    """
    bent, best = bends(function, *ends), None
    cells = FEWEST_CELLS
    while cells <= MOST_CELLS and (best is None or best.bound > ENOUGH):
        made = _Cells(function, limits, fitted_grid(*ends, bent, cells), whole, scale).made()
        if made is not None and (best is None or made.bound < best.bound):
            best = made
        cells *= 2
    return best


class _Cells:
    """The cells of one grid, in steps of the grid and of the result."""

    def __init__(
        self, function: Function, limits: Limits, grid: Grid, whole: tuple[float, float], scale: Fraction
    ) -> None:
        self.function, self.limits, self.grid, self.whole, self.scale = function, Clip(*limits), grid, whole, scale
        self.unit = float(scale)
        self.half = 1 << grid.cell >> 1
        first = np.arange(grid.cells) << grid.cell
        self.low, self.high = (np.clip(grid.real(u), *whole) for u in (first, first + 2 * self.half - 1))
        middle = np.clip(grid.real(first + self.half), *whole)
        self.middle, over = self._jet(middle, middle), self._jet(self.low, self.high)
        self.slopes, third = over[1], over[3]
        # A cell that the sums enter only in part, or where the function bends, has a straight line.
        smooth = (self.low == grid.real(first)) & (self.high == grid.real(first + 2 * self.half - 1))
        for low, high in (*self.middle, third):
            smooth &= np.isfinite(low) & np.isfinite(high)
        self.smooth = smooth
        least, most = (np.where(smooth, x, 0.0) for x in third)
        self.cubic, self.spread = (least + most) / 2, (most - least) / 2

    def _jet(self, low: Array, high: Array, *limits: Clip) -> list[Bounds]:
        jet = jet_of(self.function.then(*limits), low, high)
        scales = [float(self.grid.step) ** n / self.unit for n in range(4)]
        return [(c[0] * s, c[1] * s) for c, s in zip(jet, scales, strict=True)]

    def made(self) -> Polynomials | None:
        """The table and its bound."""
        beyond, slope = self._beyond()
        slope = max(slope, float(np.max(np.abs(self.slopes))))
        if not np.isfinite(slope):
            return None
        table, steps = _integers(self._coefficients(), self.grid.cell)
        inside = self._distance(table, steps)
        ends = interpolated(np.array([0, self.grid.last]), table, steps).astype(np.float64)
        for value, (low, high) in zip(self.limits.evaluate(ends * self.unit) / self.unit, beyond, strict=True):
            inside = max(inside, value - low - 0.5, high - value - 0.5)
        # Float64 knows 2^26 places to 2^-26 of one.
        room = 2.0**-16 + slope * 2.0**-24
        return Polynomials(self.grid, table.astype(np.int32), steps, self.scale, inside + room, slope * (1 + 2.0**-40))

    def _coefficients(self) -> Array:
        """The value, the slope and the curvature of every cell."""
        centre = [(c[0] + c[1]) / 2 for c in self.middle[:3]]
        line = self._lines()
        made = (centre[0], centre[1] + 0.75 * self.half**2 * self.cubic, centre[2])
        return np.stack([np.where(self.smooth, x, np.nan_to_num(y)) for x, y in zip(made, line, strict=True)])

    def _lines(self) -> tuple[Array, Array, Array]:
        """The line through both ends of every cell, as far as sums reach it."""
        first, last = (self.function(x) / self.unit for x in (self.low, self.high))
        width = (self.high - self.low) / float(self.grid.step)
        slope = np.where(width > 0, (last - first) / np.maximum(width, 1), 0.0)
        places = (self.grid.real(np.arange(self.grid.cells) * 2 * self.half + self.half) - self.low) / float(
            self.grid.step
        )
        return first + slope * places, slope, np.zeros(first.shape)

    def _distance(self, table: Array, steps: Steps) -> float:
        """How far the polynomials that the integers really are can be from the function, floors included."""
        half, units = self.half, _units(steps)
        value, slope, curve = (row * u for row, u in zip(table - _rounding(steps), units, strict=True))
        mend = 0.75 * half**2 * self.cubic
        mended = self.middle[1][0] + mend, self.middle[1][1] + mend
        total = _furthest(value, self.middle[0]) + _furthest(slope, mended) * half
        total += _furthest(curve, self.middle[2]) * half**2 + np.abs(self.cubic) * half**3 / 4 + self.spread * half**3
        bent = np.flatnonzero(~self.smooth)
        if bent.size:
            total[bent] = self._along(bent, value[bent], slope[bent])
        return float(np.max(total)) + half * units[1] + units[0]

    def _along(self, cells: Array, value: Array, slope: Array) -> Array:
        """The distance of lines from the function, piece by piece of their cells: at its start, and what the slopes
        make of it.
        """
        edges = np.linspace(self.low[cells], self.high[cells], PIECES + 1)
        at, (_, slopes, *_) = self._jet(edges[:-1], edges[:-1])[0], self._jet(edges[:-1], edges[1:])
        step = float(self.grid.step)
        middle = self.grid.real((cells << self.grid.cell) + self.half)
        start = _furthest(value + slope * (edges[:-1] - middle) / step, at)
        return np.asarray(
            np.max(start + _furthest(slope, slopes) * (edges[1:] - edges[:-1]) / step, axis=0, initial=0.0)
        )

    def _beyond(self) -> tuple[list[tuple[float, float]], float]:
        """Bounds of the function below the grid and above it, nothing where no sum lies there, and of its slope."""
        half = float(self.grid.step) / 2
        ends = float(self.grid.real(np.array(0))) - half, float(self.grid.real(np.array(self.grid.last))) + half
        found, slope = [], 0.0
        for low, high in ((self.whole[0], ends[0]), (ends[1], self.whole[1])):
            if low < high:
                edges = np.linspace(low, high, BEYOND + 1)
                values, slopes, *_ = self._jet(edges[:-1], edges[1:], self.limits)
                found.append((float(np.min(values[0])), float(np.max(values[1]))))
                slope = max(slope, float(np.max(np.abs(slopes))))
            else:
                found.append((np.inf, -np.inf))
        return found, slope


def _units(steps: Steps) -> list[float]:
    """What one unit of each row of a table is, in steps of the result."""
    return [2.0**-n for n in np.cumsum([steps.last, steps.first, steps.second])]


def _rounding(steps: Steps) -> Array:
    """What is added to the values of a table, so that the last shift rounds half up."""
    return np.array([[1 << steps.last >> 1], [0], [0]])


def _furthest(value: Array, bounds: Bounds) -> Array:
    return np.asarray(np.maximum(value - bounds[0], bounds[1] - value))


def _integers(coefficients: Array, cell: int) -> tuple[Array, Steps]:
    """The table of a function's coefficients, with as many bits as leave every product and sum below 2^31."""
    half = 1 << cell >> 1
    value, slope, curve = (float(np.max(np.abs(row))) for row in coefficients)
    bent = slope + curve * half
    last = max(0, min(_spare(value + bent * half), 24))
    first = max(-last, min(_spare(bent * half) - last, 31))
    second = max(-last - first, min(_spare(curve * half) - last - first, 31))
    # Shifts are not negative: what is so steep has fewer bits behind the point.
    last = max(0, last + min(first, 0))
    steps = Steps(cell, max(second, 0), max(first, 0), last)
    table = np.rint(coefficients / np.array(_units(steps))[:, None]).astype(np.int64)
    return table + _rounding(steps), steps


def _spare(most: float) -> int:
    """The most n with most 2^n below 2^PRODUCT_BITS."""
    return PRODUCT_BITS - int(np.frexp(most)[1]) if most else 2 * PRODUCT_BITS

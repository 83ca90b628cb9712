"""A function of a fine grid by polynomials of the second degree, one for each cell of the grid (A31)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """The shifts of (A31).

    cell: k, bits of a place within a cell.  second, first, last: what is shifted out after the product with the
    coefficient of the square, after that of the place, and at the end.
    """

    cell: int
    second: int
    first: int
    last: int

    def to_dict(self) -> dict[str, int]:
        """The attributes of hawq.interpolate."""
        return asdict(self)

    @staticmethod
    def of(attrs: Any) -> Steps:
        """Those that a call of hawq.interpolate carries."""
        return Steps(*(int(attrs[name]) for name in ("cell", "second", "first", "last")))


def interpolated(u: NDArray[Any], table: Int, steps: Steps) -> Int:
    """(A31) for grid integers 0 .. cells 2^k - 1.

    table: int64 of shape (3, cells), the value, the slope and the curvature of every cell.
    """
    u = np.asarray(u, np.int64)
    cell, place = u >> steps.cell, (u & (1 << steps.cell) - 1) - (1 << steps.cell >> 1)
    slope = table[1][cell] + ((table[2][cell] * place) >> steps.second)
    result: Int = (table[0][cell] + ((slope * place) >> steps.first)) >> steps.last
    return result


def worst(table: NDArray[Any], steps: Steps) -> int:
    """The largest magnitude of any product or sum inside (A31)."""
    value, slope, curvature = (int(n) for n in np.abs(table.astype(np.int64)).max(axis=1))
    half = 1 << steps.cell >> 1
    bent = -(-curvature * half >> steps.second) + slope
    return max(curvature * half, bent * half, value + -(-bent * half >> steps.first))


def extremes(table: NDArray[Any], steps: Steps, low: int, high: int) -> tuple[int, int]:
    """Bounds of the results for grid integers low .. high.

    A polynomial takes its extremes at the ends and where its slope is 0; the floors move every result by at most one
    unit of the slope times a place, one unit before the last shift, and one result.
    """
    t = table.astype(np.int64)
    cells = np.arange(low >> steps.cell, (high >> steps.cell) + 1)
    value, slope, curvature = (row[cells].astype(np.float64) for row in t)
    half = 1 << steps.cell >> 1
    first = np.maximum(low - (cells << steps.cell), 0) - half
    last = np.minimum(high - (cells << steps.cell), (1 << steps.cell) - 1) - half
    bend = curvature * 2.0**-steps.second

    def at(place: Any) -> Any:
        return value + (slope + bend * place) * place * 2.0**-steps.first

    with np.errstate(divide="ignore", invalid="ignore"):
        turn = np.where(bend != 0, -slope / (2 * bend), first)
    places = [at(p) for p in (first, last, np.clip(turn, first, last))]
    room = half * 2.0**-steps.first + 3
    ends = np.min(places) - room, np.max(places) + room
    return int(np.floor(ends[0])) >> steps.last, int(np.ceil(ends[1])) >> steps.last

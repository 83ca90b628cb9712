"""The figure of `compare-fake`: differences from the deployed integers along the network, on a logarithmic axis that
has a zero.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.need import need

from .fake_comparison import Comparison, Row

WIDEST = 50  # characters of a label, of which two stand side by side
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = {
    "simulated": ("-", "o", 4, "float network simulated"),
    "fake": ("--", "s", 4, "quantized model in float32"),
    "ours": (":", "x", 8, "ours"),
}


def check_figure(path: Path) -> None:
    """Whether a figure of that name can be drawn.

    Raises UsageError for another ending than .png or .svg, or when matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError("a figure is PNG or SVG", where=str(path), expected="a name that ends in .png or .svg")
    need("matplotlib")


def draw(compared: Sequence[Comparison], path: Path) -> bytes:
    """The figure, PNG or SVG by the path's ending: means over runs as lines, the least and the greatest as bands."""
    check_figure(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kind = path.suffix.lower().removeprefix(".")
    smallest = min(_positive(compared), default=1e-3)
    floor = 10.0 ** math.floor(math.log10(smallest))
    with matplotlib.rc_context({"svg.hashsalt": "hawq", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for one, color in zip(compared, COLORS * len(compared), strict=False):
            for curve, (line, marker, size, label) in STYLES.items():
                _plot(axes, one.blocks, curve, color, (line, marker, size), f"{one.name} ({one.precision}): {label}")
        # Logarithmic from `floor` up and linear below it, so that zero is a place on the axis.
        axes.set_yscale("symlog", linthresh=floor, linscale=0.6)
        top = 10.0 ** math.ceil(math.log10(max(_positive(compared), default=1.0)))
        axes.set_yticks([0, *10.0 ** np.arange(round(math.log10(floor)), round(math.log10(top)) + 1)])
        axes.set_ylim(-floor / 2, top * 1.2)
        axes.axhline(floor, color="0.85", linewidth=0.6)
        axes.grid(axis="y", color="0.92", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        residual = all(one.residual for one in compared)
        axes.set_xlabel("residual block" if residual else "layer (networks without residual blocks show every layer)")
        axes.set_ylabel("‖simulated − deployed‖ / ‖deployed‖")
        longest = max(len(str(line.get_label())) for line in axes.get_lines())
        figure.legend(
            frameon=False,
            loc="outside lower center",
            fontsize=8,
            ncols=2 if len(compared) > 1 and longest <= WIDEST else 1,
        )
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return stream.getvalue()


def _positive(compared: Sequence[Comparison]) -> list[float]:
    """Every difference in the figure that is a number above zero."""
    values = [v for one in compared for row in one.blocks for curve in STYLES for v in row.curves.get(curve, [])]
    return [v for v in values if 0 < v < math.inf]


def _plot(axes: Any, rows: Sequence[Row], curve: str, color: str, style: tuple[str, str, int], label: str) -> None:
    places = [
        (i, s) for i, row in enumerate(rows, 1) if (s := row.spread(curve)) is not None and math.isfinite(s.greatest)
    ]
    if not places:
        return
    x, found = [i for i, _ in places], [s for _, s in places]
    line, marker, size = style
    axes.plot(
        x,
        [s.mean for s in found],
        line,
        marker=marker,
        markersize=size,
        color=color,
        linewidth=1.2,
        label=label,
        clip_on=False,
    )
    axes.fill_between(x, [s.least for s in found], [s.greatest for s in found], color=color, alpha=0.15, linewidth=0)

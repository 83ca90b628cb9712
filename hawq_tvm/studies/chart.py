"""A picture of a page of deploy/benchmarks: times beside the fastest other runtime.

python -m hawq_tvm.studies.chart deploy/benchmarks/MACHINE-DATE.json          writes MACHINE-DATE.svg beside it
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import HawqError
from hawq_tvm.core.files import write_bytes
from hawq_tvm.core.json_files import read_json
from hawq_tvm.core.need import need

OURS = "hawq-tvm"
COLORS = {OURS: "#0072b2", "openvino": "#e69f00", "onnxruntime": "#999999", "openvino-bf16": "#cc79a7"}


def draw(results: Sequence[dict[str, Any]]) -> bytes:
    """SVG: for every network, batch and number of threads the median of each runtime, as a share of the slowest
    one's.
    """
    need("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = [f"{r['net']}, batch {r['batch']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}" for r in results]
    medians = [{e["engine"]: float(e["latency_ms"]["median"]) for e in r["engines"]} for r in results]
    with matplotlib.rc_context({"svg.hashsalt": "hawq", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.6, 0.34 * len(results) + 1.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for i, (engine, color) in enumerate(COLORS.items()):
            shares = [100 * m[engine] / max(m.values()) if engine in m else 0.0 for m in medians]
            axes.barh([n + 0.2 * (i - 1) for n in range(len(results))], shares, 0.18, color=color, label=engine)
        for n, m in enumerate(medians):
            axes.text(1, n - 0.2, f"{m[OURS]:.2f} ms", va="center", fontsize=7, color="white")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("median time of a batch, % of the slowest (shorter is better)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(COLORS), frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: write the picture beside the page's numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.chart", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("numbers", type=Path, metavar="MACHINE-DATE.json")
    path = parser.parse_args(argv).numbers
    try:
        write_bytes(path.with_suffix(".svg"), draw(read_json(path, "numbers of deploy/benchmarks")["results"]))
    except HawqError as e:
        print(f"chart: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

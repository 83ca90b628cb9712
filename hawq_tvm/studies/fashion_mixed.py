"""Bits by second-order sensitivity against bits by chance, at the same budgets, on the network and the pictures of
`fashion.py`.

    python -m hawq_tvm.studies.fashion_mixed --seeds 0,1,2 --draws 8

For every budget of bit operations one assignment of W8A8 and W4A4 (or of what --choices names) is the allocation's
(Hutchinson traces on the calibration pictures), and others are drawn: from the narrowest choice everywhere, layers
become as wide as the budget allows in random order, so that none wastes it. Ties and fixed ends are those of
`allocate`. All are quantized by nearest rounding, compiled, and answer all test pictures; the allocation's is
fine-tuned as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.cli.terminal import OUT, Grid
from hawq_tvm.core import signals
from hawq_tvm.quantize.allocate.plan import problem
from hawq_tvm.quantize.allocate.sensitivity import Settings
from hawq_tvm.quantize.allocate.table import Table, widths
from hawq_tvm.quantize.ptq.quantizer import Recipe, post_training

from .fashion import Files, Say, prepare, row, run, tuned

BUDGETS = ("bops=0.75", "bops=0.5")
CHOICES = ("W8A8", "W4A4")
SETTINGS = Settings(probes=128, batch=32)


def chance(table: Table, resource: str, limit: Fraction, rng: np.random.Generator) -> dict[str, str]:
    """An assignment that no wider choice of a group fits into any more: groups in random order, each with the widest
    choice that fits.
    """
    *wider, narrow = table.choices
    assignment = {r.name: r.fixed or narrow for r in table.rows}
    groups = [g for g in table.groups() if len(table.allowed(g)) > 1]
    for i in rng.permutation(len(groups)):
        tried = [{**assignment, **{r.name: choice for r in groups[i]}} for choice in wider]
        assignment = next((one for one in tried if table.total(resource, one) <= limit), assignment)
    return assignment


def drawn(
    table: Table, resource: str, limit: Fraction, taken: Mapping[str, str], count: int, seed: int
) -> list[dict[str, str]]:
    """Up to `count` different assignments by chance, none of them `taken`."""
    rng, found = np.random.default_rng(seed), list[dict[str, str]]()
    for _ in range(50 * count):
        made = chance(table, resource, limit, rng)
        if made != taken and made not in found:
            found.append(made)
        if len(found) == count:
            break
    return found


def _recipe(files: Files, assignment: Mapping[str, str]) -> Recipe:
    path = files.place / "bits.json"
    layers = {
        name: dict(zip(("weight", "activation"), widths(choice), strict=True)) for name, choice in assignment.items()
    }
    path.write_text(json.dumps({"layers": layers}))
    return Recipe(path, rounding="nearest")


def measure(folder: Path, seed: int, draws: int, settings: Settings, say: Say) -> list[dict[str, Any]]:
    """All assignments of one seed by sensitivities that settings measure: rows as `fashion.row` makes them, with the
    budget, the bit operations and the assignment.
    """
    with tempfile.TemporaryDirectory() as place:
        files = prepare(folder, Path(place), seed, say)
        rows = [row(files, "float", None, say)]
        found = problem(files.float, files.calibration, settings)
        table = found.table
        for budget in BUDGETS:
            allocation = found.allocate([budget])
            resource, limit = allocation.limits[0].budget.resource, allocation.limits[0].limit
            ours = dict(allocation.assignment)
            others = drawn(table, resource, limit, ours, draws, seed)
            for name, assignment in (("Hessian", ours), *((f"chance {i}", one) for i, one in enumerate(others))):
                made = row(
                    files,
                    f"{budget} {name}",
                    post_training(files.float, files.calibration, _recipe(files, assignment)),
                    say,
                )
                rows.append(
                    {
                        **made,
                        "budget": budget,
                        "kind": name.split()[0],
                        resource: float(table.total(resource, assignment)),
                        "bits": assignment,
                    }
                )
            made = row(files, f"{budget} Hessian, fine-tuned", tuned(files, _recipe(files, ours)), say)
            rows.append(
                {
                    **made,
                    "budget": budget,
                    "kind": "Hessian, fine-tuned",
                    resource: float(table.total(resource, ours)),
                    "bits": ours,
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """By budget and kind the mean over seeds and draws, and how many draws the allocation beats."""
    grid = Grid(
        "budget",
        "bits by",
        "networks",
        "top-1, mean",
        "least to greatest",
        "flips of 10,000, mean",
        "least to greatest",
        "flip more than Hessian's",
    )
    for budget in dict.fromkeys(r["budget"] for r in rows if "budget" in r):
        for kind in ("Hessian", "chance", "Hessian, fine-tuned"):
            own = [r for r in rows if r.get("budget") == budget and r["kind"] == kind]
            best = {r["seed"]: r["flips"] for r in rows if r.get("budget") == budget and r["kind"] == "Hessian"}
            top1, flips = [100 * r["top1"] for r in own], [r["flips"] for r in own]
            beaten = f"{sum(r['flips'] > best[r['seed']] for r in own)} of {len(own)}" if kind == "chance" else ""
            grid.add_row(
                budget,
                kind,
                str(len(own)),
                f"{np.mean(top1):.2f} %",
                f"{min(top1):.2f} to {max(top1):.2f}",
                f"{np.mean(flips):.0f}",
                f"{min(flips)} to {max(flips)}",
                beaten,
            )
    OUT.print(grid)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.fashion_mixed", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--draws", type=int, default=8, metavar="N", help="assignments by chance for every budget and seed (default: 8)"
    )
    parser.add_argument("--choices", default=",".join(CHOICES), help="pairs of bits (default: W8A8,W4A4)")

    def measured(args: argparse.Namespace, seed: int, say: Say) -> list[dict[str, Any]]:
        settings = replace(SETTINGS, choices=tuple(args.choices.split(",")))
        return measure(args.data, seed, args.draws, settings, say)

    return run(parser, show, measured)


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))

"""Bits by the Hessian against bits by its average trace and by chance, at the same budgets of bit operations.

    python -m hawq_tvm.studies.fashion_mixed --seeds 0,1,2 --draws 6
    python -m hawq_tvm.studies.fashion_mixed --model float.onnx --calib calibration.npz --data labelled.npz

Without --model the network and the pictures are those of `fashion.py`, one network a seed. For every budget one
assignment is the default allocation's, one that by HAWQ-V2's traces, and others are drawn: from the narrowest choice
everywhere, layers become wider in random order as the budget allows, so that none wastes it. Ties and fixed ends are
those of `allocate`. All are quantized by nearest rounding and answer all test pictures in ONNX Runtime. What is judged
is the Kullback-Leibler distance of their answers to the float network's, picture by picture: flips and top-1 are few of
so many pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hawq_tvm.core import signals
from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import check_folder
from hawq_tvm.quantize.allocate.plan import problem
from hawq_tvm.quantize.allocate.sensitivity import Settings
from hawq_tvm.quantize.allocate.table import Table, widths
from hawq_tvm.quantize.judge.runners import open_runner, scores_of
from hawq_tvm.quantize.network.data import LABELS
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe

from .fashion import Files, Say, prepare, run

Array = np.ndarray[Any, Any]
BUDGETS = ("bops=0.75", "bops=0.5")
CHOICES = ("W8A8", "W4A4")
METRICS = {"Hessian": "hessian", "traces": "trace"}
PICTURES = 500  # at a time


def chance(table: Table, resource: str, limit: Fraction, rng: np.random.Generator) -> dict[str, str]:
    """An assignment that no wider choice of a group fits into any more: all choices of all groups in random order, each
    taken if it is wider in nothing narrower, and fits.
    """
    assignment = {r.name: r.fixed or table.choices[-1] for r in table.rows}
    steps = [(g, choice) for g in table.groups() for choice in table.allowed(g)]
    for i in rng.permutation(len(steps)):
        group, choice = steps[i]
        now = widths(assignment[group[0].name])
        tried = {**assignment, **{r.name: choice for r in group}}
        wider = all(a >= b for a, b in zip(widths(choice), now, strict=True))
        assignment = tried if wider and table.total(resource, tried) <= limit else assignment
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


def _scores(model: Path, data: Path) -> Array:
    """The scores of all pictures, in float64."""
    runner = open_runner(model)
    with np.load(data) as arrays:
        inputs = {name: arrays[name] for name in arrays.files if name != LABELS}
    count = len(next(iter(inputs.values())))
    parts = [
        scores_of(runner.run({name: value[i : i + PICTURES] for name, value in inputs.items()}), str(model))
        for i in range(0, count, PICTURES)
    ]
    return np.concatenate(parts).astype(np.float64)


def logarithms(scores: Array) -> Array:
    """The logarithms of the classes' probabilities."""
    shifted: Array = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def measure(
    files: Files, seed: int, draws: int, choices: Sequence[str], say: Say
) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """All assignments for one network: rows, and the distances of every picture's answers by the row's name."""
    given = _scores(files.float, files.test)
    with np.load(files.test) as arrays:
        labels = arrays[LABELS]
    logs, answers = logarithms(given), given.argmax(1)
    rows, distances = list[dict[str, Any]](), dict[str, Array]()

    def judged(name: str, budget: str, kind: str, table: Table, assignment: Mapping[str, str]) -> None:
        bits, made = files.place / "bits.json", files.place / "quantized.onnx"
        pairs = {n: dict(zip(("weight", "activation"), widths(c), strict=True)) for n, c in assignment.items()}
        bits.write_text(json.dumps({"layers": pairs}))
        onnx.save(post_training(files.float, files.calibration, Recipe(bits, rounding="nearest")).model, str(made))
        scores = _scores(made, files.test)
        distances[name] = (np.exp(logs) * (logs - logarithms(scores))).sum(1)
        rows.append(
            {
                "seed": seed,
                "name": name,
                "budget": budget,
                "kind": kind,
                "distance": float(distances[name].mean()),
                "flips": int((scores.argmax(1) != answers).sum()),
                "right": int((scores.argmax(1) == labels).sum()),
                "pictures": len(labels),
                "bops": float(table.total("bops", assignment)),
                "bits": dict(assignment),
            }
        )
        say(f"seed {seed}: {name}: distance {rows[-1]['distance']:.6f}, {rows[-1]['flips']} flips")

    for budget in BUDGETS:
        table, limit, ours = None, Fraction(0), dict[str, str]()
        for kind, metric in METRICS.items():
            settings = replace(Settings((metric,)), choices=tuple(choices))
            found = problem(files.float, files.calibration, settings, budgets=[budget])
            allocation = found.allocate([budget])
            if table is None:
                table, limit, ours = found.table, allocation.limits[0].limit, dict(allocation.assignment)
            judged(f"{budget} {kind}", budget, kind, found.table, allocation.assignment)
        assert table is not None
        for i, one in enumerate(drawn(table, "bops", limit, ours, draws, seed)):
            judged(f"{budget} chance {i}", budget, "chance", table, one)
    for row in rows:
        # Of the same pictures: the mean difference, and its standard error.
        off = distances[row["name"]] - distances[f"{row['budget']} Hessian"]
        row["more"], row["error"] = float(off.mean()), float(off.std(ddof=1) / np.sqrt(len(off)))
    return rows, distances


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """By budget and kind the means over networks, and how many draws are farther from float than the Hessian's."""
    head = ["budget", "bits by", "networks", "distance to float, 1e-3 (least to greatest)"]
    head += ["farther than the Hessian's", "by more than 1.96 standard errors", "nearer by as much"]
    head += ["flips, mean", "more flips", "top-1, mean"]
    lines = [head, ["---"] * len(head)]
    for budget in dict.fromkeys(r["budget"] for r in rows):
        best = {r["seed"]: r["flips"] for r in rows if r["budget"] == budget and r["kind"] == "Hessian"}
        for kind in (*METRICS, "chance"):
            own = [r for r in rows if r["budget"] == budget and r["kind"] == kind]
            if not own:
                continue
            far = [1e3 * r["distance"] for r in own]
            counts = [
                sum(r["more"] > 0 for r in own),
                sum(r["more"] > 1.96 * r["error"] for r in own),
                sum(r["more"] < -1.96 * r["error"] for r in own),
            ]
            flips, more = [r["flips"] for r in own], sum(r["flips"] > best[r["seed"]] for r in own)
            cells = [budget, kind, str(len(own)), f"{np.mean(far):.2f} ({min(far):.2f} to {max(far):.2f})"]
            cells += [""] * 3 if kind == "Hessian" else [f"{c} of {len(own)}" for c in counts]
            cells += [f"{np.mean(flips):.0f}", "" if kind == "Hessian" else f"{more} of {len(own)}"]
            cells.append(f"{np.mean([r['right'] / r['pictures'] for r in own]):.2%}")
            lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def files_of(args: argparse.Namespace, seed: int, say: Say) -> Files:
    """The network of a seed and its data, trained where it is not there; the user's own, where one is given."""
    place = args.folder / f"seed{seed}"
    check_folder(args.folder)
    place.mkdir(parents=True, exist_ok=True)
    if args.model:
        return Files(seed, place, Path(args.model), Path(args.calib), Path(args.calib), Path(args.data), 0)
    real, calibration, tuning, test = (
        place / name for name in ("float.onnx", "calibration.npz", "finetune.npz", "test.npz")
    )
    if not test.exists():  # which is written last
        return prepare(args.data, place, seed, say)
    return Files(seed, place, real, calibration, tuning, test, 0)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.fashion_mixed", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--draws", type=int, default=6, metavar="N", help="assignments by chance for every budget and seed (default: 6)"
    )
    parser.add_argument("--choices", default=",".join(CHOICES), help="pairs of bits (default: W8A8,W4A4)")
    parser.add_argument("--model", help="a float ONNX file with one input and labelled data of one's own")
    parser.add_argument("--calib", help="an .npz file with the input's pictures, to calibrate on")
    parser.add_argument("--folder", type=Path, default=Path(".fashion-mixed"), help="where networks are kept")

    def measured(args: argparse.Namespace, seed: int, say: Say) -> list[dict[str, Any]]:
        if bool(args.model) != bool(args.calib):
            raise UsageError("go together", where="--model, --calib and --data", remedy="give all three, or none")
        return measure(files_of(args, seed, say), seed, args.draws, tuple(args.choices.split(",")), say)[0]

    return run(parser, lambda rows: print(markdown(rows)), measured)


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))

"""Channels taken away by the Hessian, by the norm of their weights and by chance, on Fashion-MNIST: the networks of
`fashion.py`, smaller, fitted and trained on the same pictures, in float and as compiled W8A8 packages.

    python -m hawq_tvm.studies.fashion_pruned --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hawq_tvm.cli.terminal import OUT, Grid
from hawq_tvm.core import signals
from hawq_tvm.package.package import compile as compile_package
from hawq_tvm.quantize.judge.evaluation import evaluate
from hawq_tvm.quantize.prune.pruner import RANKS, Pruning, prune
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe

from .fashion import PACKAGE_BATCH, Files, Say, prepare, run

BUDGETS = ("macs=70%", "macs=50%", "macs=35%")
# Of the training pictures, without labels in use after ranking.
IMAGES, STEPS, MULTIPLE, BATCH = 4096, 300, 4, 64


def row(files: Files, budget: str, by: str, say: Say) -> dict[str, Any]:
    """A smaller network on all test pictures, in float and as a package."""
    given = Pruning((budget,), MULTIPLE, by=by, batch=BATCH, images=IMAGES, steps=STEPS, seed=files.seed)
    found = prune(files.float, files.finetune, given)
    real, package = files.place / "smaller.onnx", files.place / f"{budget}.{by}.hawq"
    onnx.save(found.model, str(real))
    scored = evaluate(real, files.test, against=files.float)
    quantized = post_training(real, files.calibration, Recipe(8))
    compile_package(quantized.model, shapes={"x": (PACKAGE_BATCH, 1, 28, 28)}).save(package)
    deployed = evaluate(package, files.test, against=files.float)
    assert scored.against is not None
    made = {
        "seed": files.seed,
        "budget": budget,
        "by": by,
        "full": (scored.against.top1 or 0) / scored.images,
        "top1": (scored.score.top1 or 0) / scored.images,
        "flips": scored.flips,
        "package": (deployed.score.top1 or 0) / deployed.images,
        "macs": found.resources["macs"][1] / found.resources["macs"][0],
        "weights": found.resources["weights"][1] / found.resources["weights"][0],
    }
    say(f"seed {files.seed}: {budget} by {by}: {made['top1']:.2%} of {made['full']:.2%}, {made['flips']} flips")
    return made


def measure(folder: Path, seed: int, say: Say) -> list[dict[str, Any]]:
    """All budgets and ways of one seed."""
    with tempfile.TemporaryDirectory() as place:
        files = prepare(folder, Path(place), seed, say)
        return [row(files, budget, by, say) for budget in BUDGETS for by in RANKS]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The mean of all seeds, and each seed's flips."""
    grid = Grid("budget", "ranked by", "multiplications", "weights", "top-1", "W8A8 package", "flips of 10,000")
    full = np.mean([r["full"] for r in rows])
    grid.add_row("none", "", "100 %", "100 %", f"{full:.2%}", "", "0")
    for budget in BUDGETS:
        for by in RANKS:
            own = [r for r in rows if (r["budget"], r["by"]) == (budget, by)]
            shares = [f"{np.mean([r[k] for r in own]):.1%}" for k in ("macs", "weights")]
            scores = [f"{np.mean([r[k] for r in own]):.2%}" for k in ("top1", "package")]
            grid.add_row(budget, by, *shares, *scores, ", ".join(str(r["flips"]) for r in own))
    OUT.print(grid)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.fashion_pruned", description=__doc__.splitlines()[0]
    )
    return run(parser, show, lambda args, seed, say: measure(args.data, seed, say))


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))

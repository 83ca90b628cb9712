"""Calibration without data beside calibration with data, and with noise: what each costs in right answers.

    python -m hawq_tvm.studies.zero_shot float.onnx --calib real.npz --data labelled.npz --bits 8,W4A8

The network must still have its BatchNormalization. Noise is normal, of mean 0 and deviation 1, as many inputs as are
made. With --mean and --std the made inputs are bounded as pixels are. Every network answers in ONNX Runtime and is
compared with the float one on the same labelled data. Needs the extras `quantize` and `bench`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from hawq_tvm.cli.picture_options import add_picture_options, read_preprocess
from hawq_tvm.cli.terminal import OUT, Grid
from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, UsageError
from hawq_tvm.core.files import SYNTHETIC, save_npz
from hawq_tvm.quantize.judge.evaluation import Evaluation, evaluate
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.ptq.synthetic import IMAGES


def noise(model: Path, calibration: Path, preprocess: Preprocess | None, place: Path) -> Path:
    """A file of noise for a model's inputs, of the sizes that calibration data have."""
    draws = np.random.default_rng(0)
    first = next(open_data(calibration, load_float(model).inputs, preprocess).batches(1)).inputs
    save_npz(place, {n: draws.standard_normal((IMAGES, *a.shape[1:])).astype(np.float32) for n, a in first.items()})
    return place


def row(name: str, bits: str, found: Evaluation) -> list[str]:
    """A line of the table: the difference in top-1 has its 95 % interval, and the chance of one as large."""
    if found.paired is None:
        raise UsageError("is not labelled", where="--data", expected="an array `labels`, a class for every input")
    top1, apart = 100 * (found.score.top1 or 0) / found.images, found.paired
    between = f"{100 * apart.difference:+.2f} ({100 * apart.low:+.2f} to {100 * apart.high:+.2f})"
    return [bits, name, f"{top1:.2f} %", between, f"{apart.p:.2g}", f"{found.flips} of {found.images}"]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.studies.zero_shot", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a float .onnx file with BatchNormalization")
    parser.add_argument("--calib", type=Path, required=True, help="real calibration data, an .npz file")
    parser.add_argument("--data", type=Path, required=True, help="labelled data to count answers on")
    parser.add_argument("--bits", default="8,W4A8", help="with commas between (default: 8,W4A8)")
    add_picture_options(parser)
    args = parser.parse_args()
    preprocess = read_preprocess(args)
    grid = Grid("bits", "calibration", "top-1", "less float's, points", "p", "other answers")
    try:
        with tempfile.TemporaryDirectory() as place:
            quantized = Path(place) / "q.onnx"
            data = {
                "real": args.calib,
                SYNTHETIC: SYNTHETIC,
                "noise": noise(args.model, args.calib, preprocess, Path(place) / "n.npz"),
            }
            for bits in args.bits.split(","):
                for name, given in data.items():
                    made = post_training(args.model, given, Recipe(bits), preprocess=preprocess)
                    onnx.save(made.model, str(quantized))
                    found = row(name, bits, evaluate(quantized, args.data, against=args.model))
                    print(*found, file=sys.stderr, flush=True)
                    grid.add_row(*found)
    except HawqError as e:
        print(f"zero_shot: {e}", file=sys.stderr)
        return e.exit_code
    OUT.print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))

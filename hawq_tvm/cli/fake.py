"""The verb `compare-fake`: its options, what it calls, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import check_model, write_bytes

from .input_options import check_files
from .options import Command
from .picture_options import add_picture_options, read_preprocess
from .show import say
from .terminal import ERR, OUT, Grid

if TYPE_CHECKING:
    from hawq_tvm.quantize.judge.fake_comparison import Comparison, Spread

DEFINITION = "||simulated - deployed|| / ||deployed||"


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the options of the verb; verb makes its parser."""
    sub = verb(
        "compare-fake",
        'how far simulated ("fake") quantization is from the integers of a package, at every residual block: a figure,'
        " and numbers as JSON",
    )
    sub.add_argument(
        "pairs",
        nargs="+",
        metavar="MODEL PACKAGE",
        help="quantized models, each with the package that was compiled from it (for a CPU)",
    )
    sub.add_argument(
        "--data", required=True, metavar="DATA", help="an .npz file, or a folder of .npy, .npz or image files"
    )
    sub.add_argument("-o", "--output", required=True, metavar="FIGURE", help="the figure, .png or .svg")
    sub.add_argument(
        "--float",
        dest="real",
        metavar="FLOAT",
        help=(
            "the float .onnx or .pt2 that the models were quantized from: simulated with BatchNormalization unfolded"
            " and sums in float, too"
        ),
    )
    sub.add_argument(
        "--limit",
        type=int,
        default=8,
        metavar="N",
        help="at most N runs of every package, each of as many images as its batch (default: 8)",
    )
    add_picture_options(sub)
    sub.add_argument(
        "--json", action="store_true", help="print the numbers of every block and layer as JSON on standard output"
    )


def _compare_fake(args: argparse.Namespace) -> int:
    if len(args.pairs) % 2:
        raise UsageError(
            "takes models and packages in pairs",
            where="compare-fake",
            expected="MODEL PACKAGE, or MODEL PACKAGE MODEL PACKAGE",
            found=" ".join(args.pairs),
        )
    for path in args.pairs:
        check_model(path)
    check_files(args)
    figure, pixels = Path(args.output), read_preprocess(args)
    from hawq_tvm.quantize.judge.fake_figure import check_figure, draw

    check_figure(figure)
    from hawq_tvm.quantize.judge.fake_comparison import compare_fake
    from hawq_tvm.quantize.progress import measuring

    with measuring(ERR, args.quiet or args.json) as progress:
        found = [
            compare_fake(
                model,
                package,
                args.data,
                real=args.real,
                preprocess=pixels,
                limit=args.limit,
                progress=progress,
            )
            for model, package in zip(args.pairs[::2], args.pairs[1::2], strict=True)
        ]
    write_bytes(figure, draw(found, figure))
    if args.json:
        print(
            json.dumps(
                {
                    "figure": str(figure),
                    "difference": DEFINITION,
                    "float": args.real,
                    "pairs": [one.to_dict() for one in found],
                },
                indent=1,
                allow_nan=False,
            )
        )
    else:
        _show(found)
        say(f"wrote {figure}")
    return 0 if all(one.exact for one in found) else 1


def _show(found: Sequence[Comparison]) -> None:
    for one in found:
        say(
            f"{one.name} ({one.precision}), {one.runs} runs of {one.images_per_run}"
            f" image{'s' if one.images_per_run > 1 else ''}: {DEFINITION}, mean over runs"
        )
        if not one.residual:
            say("the network has no residual blocks: every layer is shown")
        simulated = any("simulated" in row.curves for row in one.blocks)
        grid = Grid(
            "block" if one.residual else "layer",
            "bits",
            "ours",
            "quantized model in float32",
            *(["float network simulated", "the same, sum rounded"] if simulated else []),
        )
        for row in one.blocks:
            curves = ("ours", "fake", *(("simulated", "simulated_rounded") if simulated else ()))
            grid.add_row(row.layer, str(row.bits), *(_text(row.spread(curve)) for curve in curves))
        OUT.print(grid)
        if one.not_matched:
            say(f"the float network has no one sum for {', '.join(one.not_matched)}")
        wrong = [row.layer for row in one.rows if row.differing]
        say(
            f"NOT equal to the reference: {', '.join(wrong)}"
            if wrong
            else f"the package equals the reference in every element of {len(one.rows)} layers"
        )


def _text(spread: Spread | None) -> str:
    return (
        ""
        if spread is None
        else "0"
        if spread.greatest == 0
        else f"{spread.mean:.2g} ({spread.least:.2g} to {spread.greatest:.2g})"
    )


COMMANDS: dict[str, Command] = {"compare-fake": _compare_fake}

"""The verbs `quantize` and `evaluate`: their options, what they call, and what they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import write_bytes
from hawq_tvm.quantize.ptq.effort import EFFORTS

from .input_options import add_classes, add_shape, check_files, parse_shapes
from .options import Command
from .picture_options import add_picture_options, read_preprocess
from .show import hint, interrupted, say
from .terminal import ERR, OUT, Grid

if TYPE_CHECKING:
    from hawq_tvm.quantize.judge.evaluation import Evaluation
    from hawq_tvm.quantize.judge.paired import Paired
    from hawq_tvm.quantize.ptq.quantizer import Quantized
    from hawq_tvm.quantize.ptq.recipe import Recipe

EXAMPLES = """examples:
  hawq-tvm quantize float.onnx --calib in.npz -o w8a8.onnx
  hawq-tvm quantize float.onnx --calib pictures --mean 127 --std 128 --bits W4A8 -o w4a8.onnx
then:
  hawq-tvm compile w8a8.onnx -o w8a8.hawq"""


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the options of both verbs; verb makes the parser of one."""
    sub = verb(
        "quantize",
        "quantize a float model after training: ONNX with QuantizeLinear and DequantizeLinear, 4 and 8 bits, that"
        " compiles to integers",
    )
    sub.epilog, sub.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    sub.add_argument("model", help="a float .onnx or .pt2 file")
    sub.add_argument(
        "--calib",
        required=True,
        metavar="DATA",
        help=(
            "what a few dozen typical inputs are: an .npz file (arrays called as the model's inputs), or a folder of"
            " .npy, .npz or image files; images need --mean and --std; synthetic: made from the statistics of"
            " BatchNormalization, for pictures best with --mean and --std"
        ),
    )
    sub.add_argument("-o", "--output", required=True, metavar="Q.onnx", help="the quantized model")
    add_shape(sub)
    add_recipe_options(sub)
    sub.add_argument(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="images at a time where the model leaves that open (default: 8)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    sub.add_argument(
        "--state",
        metavar="STATE.npz",
        help="keep the blocks that are done until the model is written, and continue from it (default: beside Q.onnx)",
    )
    add_picture_options(sub)
    sub.add_argument("--json", action="store_true", help="print JSON on standard output")
    sub = verb(
        "evaluate",
        "classify labelled images with a package or an ONNX model: top-1, top-5, and agreement with another model; of"
        " answers that are no classes, how far they are from another model's",
    )
    sub.add_argument("model", help="a package or an ONNX file")
    sub.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a folder of images, of one folder per class, a list of 'FILE CLASS' lines (.txt, .csv), or an .npz file",
    )
    sub.add_argument(
        "--labels",
        metavar="FILE",
        help="'FILE CLASS' lines, or FILE,CLASS in a .csv, for a folder of images (default: labels.txt in it)",
    )
    sub.add_argument("--limit", type=int, default=None, metavar="N", help="N images, evenly spaced over the list")
    add_shape(sub)
    sub.add_argument("--against", metavar="MODEL", help="another package or ONNX model: count the answers that differ")
    add_classes(sub)
    add_picture_options(sub)
    sub.add_argument("--json", action="store_true", help="print JSON on standard output")


def add_recipe_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of post-training quantization, but for the batch and the seed."""
    sub.add_argument(
        "--bits",
        default="8",
        metavar="8|4|W4A8|BITS.json",
        help=(
            "8: weights and activations of 8 bits; 4: of 4; W4A8: weights of 4 (or 2, 3, 6) and activations of 8; or,"
            " layer by layer, the file that `allocate` wrote (default: 8)"
        ),
    )
    sub.add_argument(
        "--observer",
        choices=("minmax", "percentile", "mse", "entropy"),
        default="mse",
        help="chooses the ranges of activations (default: mse)",
    )
    sub.add_argument(
        "--percentile", type=float, default=99.99, metavar="P", help="for --observer percentile (default: 99.99)"
    )
    ends = sub.add_mutually_exclusive_group()
    ends.add_argument(
        "--keep-first-last",
        dest="keep",
        action="store_true",
        default=None,
        help="the first and the last layer have 8 bits (the default, but for a BITS.json)",
    )
    ends.add_argument(
        "--no-keep-first-last", dest="keep", action="store_false", default=None, help="they have the bits of all others"
    )
    sub.add_argument(
        "--no-keep-small",
        dest="narrow_small",
        action="store_true",
        help="depthwise convolutions, and the smallest layers that have 1/32 of the weights together, have the bits of "
        "all others (default: 8, but for a BITS.json)",
    )
    sub.add_argument("--symmetric", action="store_true", help="zero point 0 for tensors with both signs, too")
    sub.add_argument(
        "--weight-range",
        choices=("minmax", "mse"),
        default=None,
        help="where weights are clipped (default: mse below 8 bits, minmax at 8)",
    )
    sub.add_argument(
        "--rounding",
        choices=("learned", "nearest"),
        default=None,
        help=(
            "of what has fewer than 8 bits: learned from the data, block by block, with scales and biases, or nearest"
            " (default: learned; for finetune nearest)"
        ),
    )
    sub.add_argument(
        "--effort",
        default="fast",
        metavar="fast|good|best|N",
        help=(
            "iterations of learning a block behind the fit of its layers, taken where images apart agree:"
            f" {', '.join(f'{name} {n}' for name, n in EFFORTS.items())}, or N (default: fast)"
        ),
    )
    sub.add_argument(
        "--bias-correction",
        action="store_true",
        help="correct scales and biases for the deviation and mean of layers' outputs where nothing is learned, too",
    )
    sub.add_argument(
        "--equalize",
        choices=("off", "relu", "relu6"),
        nargs="?",
        const="relu",
        default=None,
        help=(
            "scale channels between layers to like ranges; relu6: also across ReLU6, which becomes ReLU (default: relu"
            " where something is learned)"
        ),
    )
    sub.add_argument(
        "--smooth",
        choices=("yes", "no"),
        default="yes",
        help="bring channels of what matrix products read to like ranges, where their error falls (default: yes)",
    )
    sub.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images that are learned from (default: 128 of 224 x 224 pixels, up to 1,024 of smaller ones)",
    )


def read_recipe(args: argparse.Namespace) -> Recipe:
    """What the options say.

    Raises UsageError for those that contradict each other.
    """
    from hawq_tvm.quantize.ptq.recipe import Recipe

    return Recipe(
        args.bits,
        args.observer,
        args.percentile,
        _keeps(args),
        args.symmetric,
        None if args.weight_range is None else args.weight_range == "mse",
        equalize=args.equalize,
        correct_bias=args.bias_correction,
        rounding=args.rounding,
        effort=int(args.effort) if args.effort.isdecimal() else args.effort,
        images=args.images,
        batch=args.batch,
        seed=args.seed,
        smooth=args.smooth == "yes",
        keep_small=not args.narrow_small,
    )


def _quantize(args: argparse.Namespace) -> int:
    check_files(args)
    recipe, shapes, pixels = read_recipe(args), parse_shapes(args.shape), read_preprocess(args)
    state = Path(args.state or f"{Path(args.output).with_suffix('')}.state.npz")
    from hawq_tvm.quantize.progress import measuring
    from hawq_tvm.quantize.ptq.quantizer import post_training

    try:
        with measuring(ERR, args.quiet or args.json) as progress:
            found = post_training(
                args.model, args.calib, recipe, shapes=shapes, preprocess=pixels, state=state, progress=progress
            )
    except KeyboardInterrupt as told:
        raise interrupted(state) from told
    code = written(args, found)
    state.unlink(missing_ok=True)
    return code


def written(args: argparse.Namespace, found: Quantized, more: Callable[[], None] = lambda: None) -> int:
    """Write a quantized model and say what it is, and `more`; returns the exit code."""
    data = found.model.SerializeToString()
    write_bytes(Path(args.output), data)
    if args.json:
        print(json.dumps({"output": args.output, "bytes": len(data), **found.to_dict()}, indent=1))
    else:
        show_quantized(found)
        more()
        say(f"wrote {args.output} ({len(data):,} bytes)")
    return 0


def _keeps(args: argparse.Namespace) -> bool:
    """Whether the first and the last layer keep 8 bits.

    Raises UsageError for an option beside a file that says for every layer how many it has.
    """
    given = ["--keep-first-last"] * (args.keep is not None) + ["--no-keep-small"] * args.narrow_small
    if given and Path(args.bits).suffix == ".json":
        raise UsageError(
            "is for one width for all layers",
            where=given[0],
            found=f"--bits {args.bits}",
            remedy="write the layers' widths into that file",
        )
    return args.keep is not False


def show_quantized(found: Quantized) -> None:
    """Every layer's bits, grid and errors, and the notes."""
    grid = Grid("layer", "bits", "input", "scale", "weight error")
    for row in found.layers:
        zero = f", zero point {row['activation_zero_point']}" if row["activation_zero_point"] else ""
        grid.add_row(
            row["layer"],
            f"W{row['weight_bits']}A{row['activation_bits']}",
            row["activation_type"] + zero,
            f"{row['activation_scale']:.4g}",
            f"{row['weight_error']:.2g}",
        )
    OUT.print(grid)
    notes = found.notes
    moved = "; weights moved, too, to make good what layers before them lost" if notes["blocks"] else ""
    squares = f"errors are squared, as shares of the float values' squares{moved}"
    say(f"{notes['observer']} on {notes['images']} images; {squares}")
    if notes["small"]:
        count = len(notes["small"])
        layers = "layer keeps" if count == 1 else "layers keep"
        say(f"{count} depthwise or small {layers} 8 bits: `allocate` may give fewer, --no-keep-small does")
    for name, parts in notes["joined"].items():
        say(f"{name} is an output joined of {len(parts)} tensors: each keeps a scale of its own")
    if notes["float_tail"]:
        from hawq_tvm.core.cut import of_fields

        say(f"CUT     behind {of_fields(notes['float_tail']).text()}; stays float: compile with --allow-float-tail")
    if notes["equalized"]:
        replaced = f"; {len(notes['relu6_replaced'])} ReLU6 became ReLU" if notes["relu6_replaced"] else ""
        say(f"equalised the outputs of {len(notes['equalized'])} layers{replaced}")
    if notes["smoothed"]:
        _show_smoothed(notes["smoothed"])
    if notes["blocks"]:
        _show_blocks(notes["blocks"])
    elif any(row["weight_bits"] < 8 for row in found.layers):
        say("weights of few bits were rounded to nearest: --rounding learned loses less, `evaluate` says how much")
    say(f"{notes['parameters']:,} weights in {notes['weight_bytes']:,} bytes")
    for shape in _open_inputs(found):
        say(f"OPEN    compile with --shape {shape}, or another size: the model leaves it open")


def _open_inputs(found: Quantized) -> list[str]:
    """A shape to compile with, NAME=1x3x224x224, for every input that leaves a dimension open."""
    from hawq_tvm.frontend.common.inputs import example

    stored = {t.name for t in found.model.graph.initializer}
    dims = {
        one.name: [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
        for one in found.model.graph.input
        if one.name not in stored and (kind := one.type.tensor_type).HasField("shape")
    }
    return [f"{name}={example(sizes)}" for name, sizes in dims.items() if any(isinstance(d, str) for d in sizes)]


def _show_blocks(rows: Sequence[Mapping[str, Any]]) -> None:
    """What every block gained."""
    grid = Grid("block", "layers", "error, nearest", "error now", "seconds")
    for row in rows:
        ends = list(dict.fromkeys((*row["layers"][:1], *row["layers"][-1:])))
        more = f" ({len(row['layers'])} layers)" if len(row["layers"]) > 2 else ""
        errors = [f"{row[name]:.3g}" for name in ("error_before", "error_after")]
        grid.add_row(str(row["block"]), " ... ".join(ends) + more, *errors, f"{row['seconds']:.1f}")
    OUT.print(grid)
    learned = [row["iterations"] for row in rows if row["iterations"]]
    how = f"{len(learned)} of {len(rows)} blocks were learned, {max(learned)} iterations each" if learned else ""
    say(f"{how or 'scales and biases were corrected'}, in {sum(row['seconds'] for row in rows):.0f} s")


def _show_smoothed(rows: Sequence[Mapping[str, Any]]) -> None:
    """What was smoothed, how, and the error of what its readers give, on data that did not choose the factors."""
    grid = Grid("smoothed", "factors", "before", "after", "divided")
    for row in rows:
        of = {"largest": "largest", "mean": "mean square"}[row["magnitude"]]
        factors = f"{of}^{row['powers'][0]:g}" + (f" / weights^{row['powers'][1]:g}" if row["powers"][1] else "")
        errors = [f"{row[key]:.2g}" for key in ("error_before", "error_after")]
        grid.add_row(row["tensor"], factors, *errors, ", ".join(row["divided"]) or "by a multiplication")
    OUT.print(grid)


def _evaluate(args: argparse.Namespace) -> int:
    check_files(args)
    shapes, pixels = parse_shapes(args.shape), read_preprocess(args)
    from hawq_tvm.quantize.judge.evaluation import evaluate
    from hawq_tvm.quantize.progress import measuring

    with measuring(ERR, args.quiet or args.json) as progress:
        found = evaluate(
            args.model,
            args.data,
            shapes=shapes,
            preprocess=pixels,
            labels=args.labels,
            limit=args.limit,
            against=args.against,
            classes=args.classes,
            progress=progress,
        )
    print(json.dumps(found.to_dict(), indent=1)) if args.json else _show_evaluation(found)
    return 0


def _show_evaluation(found: Evaluation) -> None:
    grid = Grid("model", "images", "top-1", "top-5")
    for score in filter(None, (found.score, found.against)):
        shares = ["" if n is None else f"{n / found.images:.2%} ({n})" for n in (score.top1, score.top5)]
        grid.add_row(score.name, str(found.images), *shares)
    OUT.print(grid)
    if found.flips is not None:
        text = f"{found.flips} of {found.images} first answers differ ({found.flips / found.images:.2%})"
        if found.lost is not None:
            text += f"; right before and wrong now {found.lost}, wrong before and right now {found.gained}"
        say(text)
    if found.paired is not None:
        say(_judged(found.paired))
    if found.against is not None and found.flips is None:
        change = "no share: an output is 0 throughout" if found.change is None else f"{found.change:.4g}"
        say(f"squared change of the outputs, as a share of {found.against.name}'s squares: {change}")
    if found.answers is not None:
        hint(found.answers)


def _judged(found: Paired) -> str:
    """A difference in points, its interval, and whether it can be chance."""
    from hawq_tvm.quantize.judge.paired import CONFIDENCE

    chance = "no finding: chance alone does as much" if found.p > 1 - CONFIDENCE else "more than chance"
    return (
        f"top-1 differs by {100 * found.difference:+.2f} points, {CONFIDENCE:.0%} interval {100 * found.low:+.2f} to"
        f" {100 * found.high:+.2f}; McNemar's exact p = {found.p:.3g}: {chance}"
    )


COMMANDS: dict[str, Command] = {"quantize": _quantize, "evaluate": _evaluate}

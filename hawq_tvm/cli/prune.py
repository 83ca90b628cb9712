"""The verb `prune`: its options, what it calls, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hawq_tvm.core.files import write_bytes

from .input_options import add_classes, add_shape, check_files, parse_shapes
from .options import Command
from .picture_options import add_picture_options, read_preprocess
from .show import hint, say
from .terminal import ERR, OUT, Grid

if TYPE_CHECKING:
    from hawq_tvm.quantize.prune.pruner import Pruned

EXAMPLES = """examples:
  hawq-tvm prune float.onnx --calib in.npz --budget macs=60% -o smaller.onnx
  hawq-tvm prune float.onnx --calib pictures --mean 127 --std 128 --budget weights=3M --multiple 16 -o smaller.onnx
then:
  hawq-tvm quantize smaller.onnx --calib in.npz -o w8a8.onnx"""


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verb's options; verb makes its parser."""
    sub = verb(
        "prune",
        "take channels away from a float network, those whose loss by second order is least for what they cost, and"
        " fit the rest",
    )
    sub.epilog, sub.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    sub.add_argument("model", help="a float .onnx or .pt2 file")
    sub.add_argument(
        "--calib", required=True, metavar="DATA", help="an .npz file, or a folder of .npy, .npz or image files"
    )
    sub.add_argument(
        "--budget",
        action="append",
        required=True,
        metavar="macs=60%%",
        help="at most this share, or this amount, of the multiplications for one image (macs) or of the weights"
        " (weights): macs=60%%, macs=1.2G, weights=500K; repeatable",
    )
    sub.add_argument("-o", "--output", required=True, metavar="SMALLER.onnx")
    add_shape(sub)
    sub.add_argument(
        "--multiple", type=int, default=8, metavar="N", help="leave channels in multiples of N (default: 8)"
    )
    sub.add_argument(
        "--keep", action="append", default=[], metavar="LAYER", help="a layer whose channels stay; repeatable"
    )
    sub.add_argument(
        "--by",
        default="hessian",
        choices=("hessian", "norm", "chance"),
        help="what channels are ranked by; norm and chance are to compare with (default: hessian)",
    )
    sub.add_argument("--probes", type=int, default=32, metavar="N", help="sets of random signs (default: 32)")
    sub.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="images at a time where the model leaves that open (default: 32)",
    )
    sub.add_argument(
        "--images",
        type=int,
        default=512,
        metavar="N",
        help="images that the weights which stay are fitted on; 0 leaves them as they were (default: 512)",
    )
    sub.add_argument(
        "--steps",
        type=int,
        default=300,
        metavar="N",
        help="batches for which they then learn the full network's answers (default: 300)",
    )
    sub.add_argument("--seed", type=int, default=0)
    add_classes(sub)
    add_picture_options(sub)
    sub.add_argument("--json", action="store_true", help="print JSON on standard output")


def _prune(args: argparse.Namespace) -> int:
    check_files(args)
    shapes, pixels = parse_shapes(args.shape), read_preprocess(args)
    from hawq_tvm.quantize.progress import measuring
    from hawq_tvm.quantize.prune.pruner import Pruning, prune

    pruning = Pruning(
        tuple(args.budget),
        args.multiple,
        tuple(args.keep),
        args.by,
        args.probes,
        args.batch,
        args.images,
        args.steps,
        args.seed,
        args.classes,
    )
    with measuring(ERR, args.quiet or args.json) as progress:
        found = prune(args.model, args.calib, pruning, shapes=shapes, preprocess=pixels, progress=progress)
    data = found.model.SerializeToString()
    write_bytes(Path(args.output), data)
    if args.json:
        print(json.dumps({"output": args.output, "bytes": len(data), **found.to_dict()}, indent=1))
    else:
        _show(found)
        say(f"wrote {args.output} ({len(data):,} bytes)")
    return 0


def _show(found: Pruned) -> None:
    """Every layer's weights before and after, with the errors of what it makes, and what is saved."""
    grid = Grid("layer", "weight", "of", "error", "fitted")
    for row in found.layers:
        shapes = ["x".join(map(str, row[side])) for side in ("after", "before")]
        errors = [f"{row[k]:.2g}" if k in row else "" for k in ("error_before", "error_after")]
        grid.add_row(row["layer"], *(shapes if shapes[0] != shapes[1] else (shapes[0], "")), *errors)
    OUT.print(grid)
    for resource, (before, after) in found.resources.items():
        say(f"{resource}: {after:,.0f} of {before:,.0f} ({after / before:.1%})")
    if found.distance:
        before, after = found.distance
        if found.answers.classes:
            say(f"distance to the full network's answers: {before:.2g} nats, trained {after:.2g}")
        else:
            say(f"squared change of the outputs, as a share of their squares: {before:.2g}, trained {after:.2g}")
    hint(found.answers)


COMMANDS: dict[str, Command] = {"prune": _prune}

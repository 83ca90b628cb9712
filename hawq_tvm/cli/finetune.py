"""The verb `finetune`: its options, what it calls, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.network.answers import Answers

from .input_options import add_classes, add_shape, check_files, parse_shapes
from .options import Command
from .picture_options import add_picture_options, read_preprocess
from .quantize import add_recipe_options, read_recipe, written
from .show import hint, say
from .terminal import ERR, OUT, Grid


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verb's options; verb makes its parser."""
    sub = verb(
        "finetune",
        "quantize a float model and train it in the deployed integer arithmetic, taught by the float one: ONNX as"
        " `quantize` writes it",
    )
    sub.add_argument("model", help="a float .onnx or .pt2 file, best with an open batch")
    sub.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="images to train on, with labels if there are any: an .npz file, or a folder of .npy, .npz or image files",
    )
    sub.add_argument(
        "--calib", metavar="DATA", help="images that choose the ranges before training (default: those of --data)"
    )
    sub.add_argument(
        "--validation", metavar="DATA", help="images to choose the best epoch by (default: a part of --data)"
    )
    sub.add_argument("-o", "--output", required=True, metavar="Q.onnx")
    sub.add_argument("--epochs", type=int, default=2, metavar="N", help="passes over the images (default: 2)")
    sub.add_argument(
        "--rate",
        type=float,
        default=0.02,
        metavar="X",
        help="of learning, in steps of the integer grid (default: 0.02)",
    )
    sub.add_argument(
        "--batch",
        type=int,
        default=64,
        metavar="N",
        help="images of a step; a model that fixes fewer at a time takes them in turns (default: 64)",
    )
    sub.add_argument(
        "--alpha",
        type=float,
        default=0.5,
        metavar="X",
        help=(
            "share of the labels in the loss, the rest is the distance to the float network's answers; 0 without labels"
            " (default: 0.5)"
        ),
    )
    sub.add_argument("--temperature", type=float, default=4.0, metavar="T", help="of that distance (default: 4)")
    sub.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="X",
        help="share of --data that chooses the best epoch (default: 0.1)",
    )
    sub.add_argument(
        "--checked",
        type=int,
        default=16,
        metavar="N",
        help="images on which the compiled package must equal what was trained; 0: do not compile (default: 16)",
    )
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: a GPU if there is one)",
    )
    sub.add_argument(
        "--state",
        metavar="STATE.npz",
        help="written after every epoch; an interrupted run is continued by the same command",
    )
    sub.add_argument("--seed", type=int, default=0)
    add_shape(sub)
    add_classes(sub)
    add_recipe_options(sub)
    add_picture_options(sub)
    sub.add_argument("--json", action="store_true", help="print JSON on standard output")


def _finetune(args: argparse.Namespace) -> int:
    check_files(args)
    recipe, shapes, pixels = read_recipe(args), parse_shapes(args.shape), read_preprocess(args)
    if args.validation is not None and args.validation == args.data:
        raise UsageError(
            "are the images to train on",
            where=f"--validation {args.validation}",
            expected="other images",
            remedy="leave it out: a part of --data is then held out",
        )
    from hawq_tvm.quantize.progress import measuring
    from hawq_tvm.quantize.qat.training import Training, finetune

    training = Training(
        args.epochs,
        args.rate,
        args.batch,
        args.alpha,
        args.temperature,
        args.held_out,
        args.checked,
        args.seed,
        args.device,
        args.classes,
    )
    with measuring(ERR, args.quiet or args.json) as progress:
        found = finetune(
            args.model,
            args.data,
            recipe,
            training,
            calibration=args.calib,
            validation=args.validation,
            shapes=shapes,
            preprocess=pixels,
            state=args.state,
            progress=progress,
        )
    return written(args, found, lambda: _show_training(found.notes["finetune"]))


def _show_training(notes: Mapping[str, Any]) -> None:
    grid = Grid("epoch", "training loss", "validation loss", "top-1", "same answer as float", "seconds")
    for row in notes["epochs_run"]:
        trained, top1 = row["train_loss"], row["top1"]
        kept = " (kept)" if row["epoch"] == notes["kept_epoch"] else ""
        shares = ["" if share is None else f"{share:.2%}" for share in (top1, row["agreement"])]
        grid.add_row(
            f"{row['epoch']}{kept}",
            "" if trained is None else f"{trained:.4g}",
            f"{row['loss']:.4g}",
            *shares,
            f"{row['seconds']:.1f}",
        )
    OUT.print(grid)
    say(
        f"trained on {notes['images']} images ({notes['device']}), epoch chosen on {notes['validation_images']} others;"
        " epoch 0 is the network before training"
    )
    hint(Answers(notes["answers"] == "classes", notes["answers_by"]))
    if notes["package_equal_on"]:
        say(f"the compiled package equals what was trained on {notes['package_equal_on']} images, element by element")


COMMANDS: dict[str, Command] = {"finetune": _finetune}

"""The verbs `allocate` and `latency`: their options, and what they call."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import check_output, write_bytes, write_text
from hawq_tvm.core.need import need

from .input_options import add_classes, add_shape, check_files, parse_shapes
from .options import Command
from .picture_options import add_picture_options, read_preprocess
from .show import interrupted
from .terminal import ERR

CHOICES, METRIC = "W8A8,W4A8,W4A4", "hessian"
# What a table says itself, or has no use for.
FOR_MODELS = (
    *("shape", "calib", "choices", "free_ends", "no_ties", "per_block", "metric", "probes", "tolerance", "batch"),
    *("seed", "state", "classes", "mean", "std", "resize", "resample", "preprocess", "target", "threads"),
)


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the options of both verbs; verb makes the parser of one."""
    sub = verb(
        "allocate", "choose 2 to 8 bits for every layer of a float model, by second-order sensitivity under budgets"
    )
    sub.add_argument("model", nargs="?", help="a float .onnx or .pt2 file")
    add_shape(sub)
    sub.add_argument(
        "--table",
        metavar="TABLE.json",
        help="instead of a model: layers with parameters, macs, sensitivity, latency_us, tie",
    )
    sub.add_argument("--calib", metavar="DATA", help="an .npz file, or a folder of .npy, .npz or image files")
    sub.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="size=0.5",
        help="size, bops or latency: 0 is the least possible, 1 all W8A8; or 60%%, 6.7MB, 72G, 2.5ms; repeatable",
    )
    sub.add_argument("-o", "--output", metavar="BITS.json")
    sub.add_argument("--fix", action="append", default=[], metavar="LAYER=W8A8", help="a layer's bits; repeatable")
    _add_choices(sub)
    sub.add_argument("--free-ends", action="store_true", help="let the first and the last layer have fewer than 8 bits")
    sub.add_argument(
        "--no-ties",
        action="store_true",
        help="let layers that read one tensor (a shortcut and its block's first convolution) differ",
    )
    sub.add_argument(
        "--per-block",
        action="store_true",
        help="the layers of a block (a residual block, an attention, a few layers of a chain) get the same bits",
    )
    sub.add_argument(
        "--metric",
        default=METRIC,
        help="hessian, trace, fisher or output; with commas: the first is minimized, the others are shown (default:"
        f" {METRIC})",
    )
    sub.add_argument(
        "--probes",
        type=int,
        default=128,
        metavar="N",
        help="the effort of --metric trace: N sets of random signs for every layer, spent where the choice hangs on"
        " them (default: 128)",
    )
    sub.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="X",
        help="without a budget: stop when every layer's relative standard error is below X (default: 0.1)",
    )
    sub.add_argument(
        "--batch",
        type=int,
        default=None,
        metavar="N",
        help="images at a time where the model leaves that open (default: 4 to 32, by their size)",
    )
    sub.add_argument("--seed", type=int, default=0)
    add_classes(sub)
    sub.add_argument(
        "--state", metavar="STATE.npz", help="keep what is measured, and continue from it (default: beside BITS.json)"
    )
    add_picture_options(sub)
    sub.add_argument(
        "--latency", metavar="TABLE.json", help="the table that `latency` wrote; else a latency budget measures here"
    )
    sub.add_argument("--target", default="host", help="for a latency budget: as for compile (default: host)")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="for measuring latency; default: all cores")
    sub.add_argument(
        "--pareto",
        metavar="FRONT.json",
        help="write the front of sensitivity against every resource: all of it, or, where pairs of layers count, the"
        " best for 65 budgets",
    )
    sub.add_argument("--plot", metavar="FRONT.svg", help="draw the fronts, .svg or .png")
    sub.add_argument("--json", action="store_true", help="print JSON on standard output")
    sub.set_defaults(default=sub.get_default)
    sub = verb("latency", "measure every layer's kernel in every choice of bits, for allocate --latency")
    sub.add_argument("model", help="a float .onnx or .pt2 file")
    sub.add_argument("-o", "--output", required=True, metavar="TABLE.json")
    add_shape(sub)
    _add_choices(sub)
    sub.add_argument(
        "--target", default="host", help="as for compile; this machine must be able to run it (default: host)"
    )
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("--json", action="store_true", help="print JSON on standard output")


def _add_choices(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--choices",
        default=CHOICES,
        metavar="W8A8,W4A8",
        help=f"pairs of bits that a layer may have, of weights 2, 3, 4, 6, 8, of its input 4, 8 (default: {CHOICES})",
    )


def _allocate(args: argparse.Namespace) -> int:
    _check(args)
    check_files(args)
    pixels = read_preprocess(args)
    from hawq_tvm.quantize.allocate.budgets import Budget
    from hawq_tvm.quantize.allocate.plan import (
        Latencies,
        Problem,
        bits_file,
        fronts_file,
        picture,
        problem,
        problem_of_table,
        read_latencies,
    )
    from hawq_tvm.quantize.network.load import load_float
    from hawq_tvm.quantize.progress import measuring

    from .show_quantize import show_allocation, show_fronts

    shapes = parse_shapes(args.shape)
    budgets, fixed = [Budget.parse(b) for b in args.budget], _fixed(args.fix)
    # Kernels are measured once: another run takes what this one measured by --latency.
    times = f"{Path(args.output).with_suffix('')}.latency.json" if args.output else None
    if times:
        check_output(Path(times))
    latencies = read_latencies(args.latency) if args.latency else None
    state = args.state or (f"{Path(args.output).with_suffix('')}.state.npz" if args.output else None)
    try:
        with measuring(ERR, args.quiet or args.json) as progress:
            found: Problem
            if args.table:
                found = problem_of_table(args.table, fixed, latencies)
            else:
                from hawq_tvm.quantize.allocate.sensitivity import Settings

                metrics, choices = tuple(args.metric.split(",")), tuple(args.choices.split(","))
                settings = Settings(metrics, args.probes, args.tolerance, args.seed, args.batch, choices, args.classes)
                graph = load_float(args.model, shapes)
                for name in fixed:
                    graph.layer(name)

                def timed() -> Latencies:
                    from hawq_tvm.quantize.allocate.latency import measure_latencies

                    report = measure_latencies(
                        graph, args.target, threads=args.threads, choices=settings.choices, progress=progress
                    )
                    if times:
                        write_text(Path(times), json.dumps(report.to_dict(), indent=1) + "\n")
                        ERR.print(f"wrote {times}, for --latency")
                        args.latency = times
                    return report.latencies

                lacking = latencies is None and any(b.resource == "latency" for b in budgets)
                found = problem(
                    graph,
                    args.calib,
                    settings,
                    preprocess=pixels,
                    tie="blocks" if args.per_block else not args.no_ties,
                    fix_ends=not args.free_ends,
                    fixed=fixed,
                    latencies=timed if lacking else latencies,
                    budgets=budgets,
                    state=state,
                    progress=progress,
                )
    except KeyboardInterrupt as told:
        raise interrupted(Path(state) if state else None) from told
    provenance = {
        **found.provenance,
        **({"model": args.model} if args.model else {}),
        **({"latency": args.latency} if args.latency else {}),
    }
    allocation = found.allocate(budgets) if budgets else None
    fronts = found.fronts() if args.pareto or args.plot else []
    fields = bits_file(allocation, provenance) if allocation else {}
    if args.output and allocation:
        write_text(Path(args.output), json.dumps(fields, indent=1) + "\n")
    if args.pareto:
        write_text(Path(args.pareto), json.dumps(fronts_file(fronts)) + "\n")
    if args.plot:
        write_bytes(Path(args.plot), picture(fronts, Path(args.plot), allocation))
    points = {f.resource: len(f.costs) for f in fronts}
    if args.json:
        print(json.dumps({**fields, **({"front_points": points} if fronts else {})}, indent=1))
        return 0
    if allocation:
        show_allocation(allocation, provenance)
    if fronts:
        show_fronts(points)
    for path in filter(None, (args.output if allocation else None, args.pareto, args.plot)):
        ERR.print(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that do not go together."""
    if bool(args.model) == bool(args.table):
        raise UsageError(
            "takes a model or --table",
            where="allocate",
            expected="allocate MODEL --calib DATA, or allocate --table TABLE.json",
            found="both" if args.model else "neither",
        )
    given = [name for name in FOR_MODELS if args.table and getattr(args, name) != args.default(name)]
    if given:
        raise UsageError("is for a model", where=f"--{given[0].replace('_', '-')}", remedy="leave it out")
    if args.per_block and args.no_ties:
        raise UsageError("do not go together", where="--per-block and --no-ties", remedy="leave one of them out")
    if args.model and not args.calib:
        raise UsageError("needs calibration data", where="allocate", expected="--calib DATA")
    if not args.budget and not (args.pareto or args.plot):
        raise UsageError(
            "there is nothing to allocate for",
            where="allocate",
            expected="--budget size=0.5 and the like, --pareto or --plot",
        )
    if args.budget and not args.output and not args.json:
        raise UsageError("does not say where to write the bits", where="allocate", expected="-o BITS.json, or --json")
    if args.plot:
        if Path(args.plot).suffix.lower() not in (".svg", ".png"):
            raise UsageError(
                "a picture is PNG or SVG", where=f"--plot {args.plot}", expected="a name that ends in .png or .svg"
            )
        need("matplotlib")


def _fixed(texts: list[str]) -> dict[str, str]:
    from hawq_tvm.quantize.allocate.table import widths

    fixed = {}
    for text in texts:
        name, equals, choice = text.rpartition("=")
        if not equals or not name:
            raise UsageError("is not understood", where=f"--fix {text}", expected="LAYER=W8A8")
        widths(choice, f"--fix {text}")
        fixed[name] = choice
    return fixed


def _latency(args: argparse.Namespace) -> int:
    check_files(args)
    shapes = parse_shapes(args.shape)
    from hawq_tvm.quantize.allocate.table import checked_choices

    choices = checked_choices(args.choices.split(","))
    from hawq_tvm.quantize.allocate.latency import measure_latencies
    from hawq_tvm.quantize.network.load import load_float
    from hawq_tvm.quantize.progress import measuring

    from .show_quantize import show_latencies

    with measuring(ERR, args.quiet or args.json) as progress:
        graph = load_float(args.model, shapes)
        report = measure_latencies(graph, args.target, threads=args.threads, choices=choices, progress=progress)
    text = json.dumps(report.to_dict(), indent=1)
    write_text(Path(args.output), text + "\n")
    if args.json:
        print(text)
    else:
        show_latencies(report)
        ERR.print(f"wrote {args.output}")
    return 0


COMMANDS: dict[str, Command] = {"allocate": _allocate, "latency": _latency}

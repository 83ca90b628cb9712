"""The command line: it calls the library; options are read in `options.py`, results printed in `show.py`, decisions
made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawq_tvm.core import signals
from hawq_tvm.core.collection import uncollected
from hawq_tvm.core.errors import HawqError, RemoteError, UsageError
from hawq_tvm.core.trust import trusting

from . import allocate as allocate_commands
from . import fake as fake_commands
from . import finetune as finetune_commands
from . import imports, options, show
from . import packages as package_commands
from . import prune as prune_commands
from . import quantize as quantize_commands
from .input_options import parse_ranges, parse_shapes
from .show import say
from .terminal import ERR, OUT

if TYPE_CHECKING:
    from hawq_tvm.package.package import Package


def run(argv: Sequence[str] | None) -> int:
    """Run one command; returns its exit code."""
    args = options.parser(COMMANDS, *(g.add_verbs for g in GROUPS)).parse_args(argv)
    debug = os.environ.get("HAWQ_TVM_DEBUG", "0") != "0"
    imports.tvm_without_torch()
    try:
        with trusting(getattr(args, "trust", False)), warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                warnings.simplefilter("ignore")  # libraries announce changes of their own, to whoever calls them
            return int(args.command(args))
    except HawqError as e:
        if debug or signals.told():
            raise
        return _fail(args, str(e), e.to_dict(), e.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:  # the last resort: a user never sees a traceback unasked
        if debug or signals.told():
            raise
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        message = f"internal error ({type(e).__name__}): {first}; set HAWQ_TVM_DEBUG=1 for the traceback and report it"
        return _fail(args, message, {"error": "InternalError", "message": message}, 3)


def _fail(args: argparse.Namespace, message: str, fields: dict[str, Any], code: int) -> int:
    if getattr(args, "json", None) in (True, "-"):
        print(json.dumps({**fields, "exit_code": code}))
    ERR.print(f"hawq-tvm: {message}")
    return code


# -- helpers -----------------------------------------------------------------------------------------------


@contextmanager
def _working(args: argparse.Namespace, text: str) -> Iterator[None]:
    """A spinner on standard error while something lasts."""
    if args.quiet or not ERR.is_terminal:
        yield
        return
    with ERR.status(text):
        yield


def _progress(args: argparse.Namespace) -> Callable[[str, Any], None] | None:
    if args.quiet:
        return None

    def tell(step: str, report: Any) -> None:
        if report is not None:
            rewrites = f"{report.rewrites:>5} rewrites" if report.rewrites else " " * 14
            ERR.print(f"  {step:<19} {rewrites} {report.seconds:8.2f} s")

    return tell


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _model(args: argparse.Namespace) -> Any:
    """The model that a command is given: its path, with what only a HAWQ checkpoint needs."""
    if args.network is None and args.bits is None:
        return args.model
    from hawq_tvm.frontend.hawq.source import hawq_checkpoint

    return hawq_checkpoint(args.model, network=args.network, bits=args.bits)


# -- the commands --------------------------------------------------------------------------------------------


@uncollected()
def _inspect(args: argparse.Namespace) -> int:
    from hawq_tvm.compiler.inspection import inspect, operators

    if args.operators == bool(args.model):
        raise UsageError(
            "takes a model or --operators",
            where="inspect",
            expected="inspect MODEL.onnx, or inspect --operators",
            found="both" if args.model else "neither",
        )
    if args.operators:
        known = operators()
        _print_json(known) if args.json else show.show_operators(known)
        return 0
    with _working(args, "inspecting"):
        shapes = parse_shapes(args.shape)
        ranges = parse_ranges(args.range)
        asked = {"nonlinear": args.nonlinear, "ranges": ranges}
        report = inspect(_model(args), shapes, args.allow_float_tail, args.target, **asked)
    _print_json(report.to_dict()) if args.json else show.show_inspect(report)
    return 0 if report.compilable else 3


@uncollected()
def _compile(args: argparse.Namespace) -> int:
    from deploy.package import check_destination
    from hawq_tvm.package.package import compile as compile_package

    shapes = parse_shapes(args.shape)
    check_destination(Path(args.output))
    package = compile_package(
        _model(args),
        args.target,
        shapes=shapes,
        allow_float_tail=args.allow_float_tail,
        nonlinear=args.nonlinear,
        ranges=parse_ranges(args.range),
        progress=None if args.json else _progress(args),
        records=args.records,
        cache=not args.no_cache,
    )
    path = package.save(args.output)
    certificate = package.certificate()
    rules, tiles = (dict(Counter(row[k] for row in package.report())) for k in ("rule", "tile_from"))
    summary = {
        "package": str(path),
        "bytes": sum(f.stat().st_size for f in path.iterdir()),
        "target": package.manifest["target"],
        "inputs": package.manifest["inputs"],
        "outputs": package.manifest["outputs"],
        "kernels_by_rule": rules,
        "tiles_from": tiles,
        "float_tail": package.manifest["float_tail"],
        "cut": package.manifest.get("cut"),
        "integer_only": certificate["ok"],
        "least_margin": certificate["least_margin"],
        "thresholds": certificate["thresholds"],
        "differing_thresholds": certificate["differing"],
    }
    _print_json(summary) if args.json else show.show_compiled(package, summary)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from hawq_tvm.tuning.tuner import TRIALS, tune

    options.check_tune(args)
    servers = options.servers(args)
    options.warn_of_threads(args)
    if args.export:
        return _tune_export(args)
    if args.times:
        return _tune_import(args)
    shapes = parse_shapes(args.shape)
    records = Path(args.output or f"{Path(args.model).stem}.records.json")
    try:
        with show.tuning(ERR, args.quiet or args.json) as progress:
            report = tune(
                _model(args),
                records,
                args.target,
                trials=TRIALS if args.trials is None else args.trials,
                threads=args.threads,
                shapes=shapes,
                allow_float_tail=args.allow_float_tail,
                ranges=parse_ranges(args.range),
                progress=progress,
                servers=servers,
            )
    except KeyboardInterrupt as told:
        raise show.interrupted(records) from told
    _print_json(report.to_dict()) if args.json else show.show_tuned(report)
    return RemoteError.exit_code if report.failed else 0


def _tune_export(args: argparse.Namespace) -> int:
    from hawq_tvm.tuning.gpu.export import CANDIDATES, export

    with show.exporting(ERR, args.quiet or args.json) as progress:
        report = export(
            _model(args),
            args.export,
            args.target,
            trials=CANDIDATES if args.trials is None else args.trials,
            shapes=parse_shapes(args.shape),
            allow_float_tail=args.allow_float_tail,
            ranges=parse_ranges(args.range),
            progress=progress,
        )
    _print_json(report.to_dict()) if args.json else show.show_exported(report)
    return 0


def _tune_import(args: argparse.Namespace) -> int:
    from hawq_tvm.tuning.gpu.times import import_times

    records = Path(args.output or f"{Path(args.model).stem}.records.json")
    target = None if args.target == "host" else args.target
    report = import_times(
        args.times,
        records,
        _model(args),
        target,
        shapes=parse_shapes(args.shape),
        allow_float_tail=args.allow_float_tail,
        ranges=parse_ranges(args.range),
    )
    _print_json(report.to_dict()) if args.json else show.show_tuned(report)
    return 0


def _run(args: argparse.Namespace) -> int:
    from hawq_tvm.core import arrays
    from hawq_tvm.core.files import check_output, load_npz, save_npz
    from hawq_tvm.package.package import load

    path, servers = Path(args.output) if args.output else None, options.servers(args)
    if path is not None:
        check_output(path)
    package, given = load(args.package, emulator=args.emulator, here=servers is None), load_npz(args.inputs)
    if servers is None:
        outputs = package.run(given, tail=not args.no_tail)
    else:
        from hawq_tvm.remote.packaged import run as run_there

        outputs = run_there(package, given, servers, tail=not args.no_tail)
    if path is not None:
        save_npz(path, outputs)
    saturated = arrays.saturated(given, package.inputs)
    if args.json:
        _print_json(
            {
                "output": None if path is None else str(path),
                "saturated": saturated,
                "arrays": {k: arrays.summary(v) for k, v in outputs.items()},
            }
        )
    else:
        for name, value in outputs.items():
            say(f"{name}: {show.array_text(arrays.summary(value))}")
        for spec in package.inputs:
            if saturated.get(spec.name):
                say(f"{spec.name}: {saturated[spec.name]} values saturate, beyond {spec.declared}")
        say(f"wrote {path}" if path else "nothing written: -o OUT.npz keeps the outputs")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hawq_tvm.core.files import load_npz
    from hawq_tvm.package.package import load

    given = load_npz(args.inputs) if args.inputs else None
    if len(args.packages) > 1:
        return _verify_together(args, [load(p, emulator=args.emulator, here=False) for p in args.packages], given)
    package = load(args.packages[0], emulator=args.emulator)
    with _working(args, "verifying every layer"):
        report = package.verify(given, random=args.random, seed=args.seed, through=args.through)
    float_tail = package.manifest["float_tail"]
    if args.json:
        _print_json({**report.to_dict(), "float_tail": float_tail, "cut": package.manifest.get("cut")})
    else:
        show.show_verify(report, float_tail)
        show.show_cut(package.manifest)
    return 0 if report.ok else 1


def _verify_together(args: argparse.Namespace, packages: list[Package], given: dict[str, Any] | None) -> int:
    from hawq_tvm.package.together import verify_packages

    with _working(args, "verifying every layer of every package"):
        report = verify_packages(packages, given, random=args.random, seed=args.seed, through=args.through)
    accepted = report.ok or (report.identical and args.where_possible)
    _print_json({**report.to_dict(), "ok": accepted}) if args.json else show.show_joint(report)
    if accepted:
        return 0
    return 1 if report.ran and not report.identical else 3


def _prove(args: argparse.Namespace) -> int:
    from hawq_tvm.package.package import load

    with _working(args, "proving"):
        package = load(args.package)
        certificate = package.prove()
    if args.json:
        _print_json(certificate.to_dict())
    else:
        show.show_certificate(certificate)
        show.show_cut(package.manifest)
    return 0 if certificate.ok else 1


def _bench(args: argparse.Namespace) -> int:
    from hawq_tvm.core.files import check_output, load_npz, write_text
    from hawq_tvm.package.package import load

    if args.model is not None and args.against is None:
        raise UsageError(
            "--model is for --against", expected="bench PKG --against openvino,onnxruntime --model MODEL.onnx"
        )
    from hawq_tvm.bench import against, peers

    from .show_bench import show as show_bench

    if args.json not in (None, "-"):
        check_output(Path(args.json))
    servers = options.servers(args)
    if servers is not None and args.against is not None:
        raise UsageError(
            "others are timed beside a package on this machine only",
            where="--against",
            remedy="leave out --rpc, or --against",
        )
    names = [] if args.against is None else peers.parse(args.against)
    peers.check_needs(names, Path(args.model) if args.model else None)
    package = load(args.package, here=servers is None)
    given = load_npz(args.inputs) if args.inputs else None
    if not names:  # a comparison refuses them
        options.warn_of_threads(args)
    settings = {
        "warmup_ms": args.warmup_ms,
        "duration": args.duration,
        "iterations": args.iterations,
        "threads": args.threads,
    }
    with _working(args, "measuring"):
        if servers is not None:
            from hawq_tvm.remote.packaged import alone as alone_there

            fields = alone_there(package, servers, given, **settings)
        elif names:
            fields = against.compare(package, args.model, names, given, **settings).to_dict()
        else:
            fields = against.alone(package, given, **settings)
    if args.json == "-":
        _print_json(fields)
        return 0
    show_bench(OUT, fields)
    if args.json:
        write_text(Path(args.json), json.dumps(fields, indent=2) + "\n")
    return 0


def _profile(args: argparse.Namespace) -> int:
    from hawq_tvm.core.files import check_output, load_npz, write_text
    from hawq_tvm.frontend.onnx.reader import read_model
    from hawq_tvm.measure import limits
    from hawq_tvm.measure.measure import checked_threads
    from hawq_tvm.package.package import load

    from .show_bench import show_profile

    if args.model and not args.overlay:
        raise UsageError("--model is for --overlay", remedy="add --overlay FILE")
    for path in filter(None, (args.svg, args.overlay)):
        check_output(Path(path))
    model = read_model(args.model) if args.model else None
    package = load(args.package)
    given = load_npz(args.inputs) if args.inputs else None
    options.warn_of_threads(args)
    with _working(args, "measuring every kernel"):
        count = checked_threads(0, args.duration, 1, args.threads)
        limit = None if package.on_gpu else limits.measure().tops(count)
        report = package.profile(given, duration=args.duration, threads=count, limit_tops=limit)
    if args.svg:
        write_text(Path(args.svg), report.svg())
    if args.overlay:
        write_text(Path(args.overlay), json.dumps(report.overlay(model), indent=2) + "\n")
    if args.json:
        _print_json(report.to_dict())
        return 0
    show_profile(report, OUT)
    for path in filter(None, (args.svg, args.overlay)):
        say(f"wrote {path}")
    return 0


GROUPS = (package_commands, allocate_commands, prune_commands, quantize_commands, finetune_commands, fake_commands)
COMMANDS: dict[str, options.Command] = {
    "inspect": _inspect,
    "compile": _compile,
    "tune": _tune,
    "run": _run,
    "verify": _verify,
    "prove": _prove,
    "bench": _bench,
    "profile": _profile,
    **{name: command for g in GROUPS for name, command in g.COMMANDS.items()},
}

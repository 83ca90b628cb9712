"""The command line: it parses, calls the library, and prints; every decision is elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import __version__
from .errors import HawqError, UsageError

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)

EXAMPLES = """examples:
  hawq-tvm inspect model.onnx
  hawq-tvm compile model.onnx -o model.hawq --shape input=1x3x224x224
  hawq-tvm run model.hawq --inputs in.npz -o out.npz
  hawq-tvm verify model.hawq --random 4 --seed 0
  hawq-tvm prove model.hawq --json
  hawq-tvm bench model.hawq --threads 1
  hawq-tvm profile model.hawq --threads 1 --svg time.svg
  hawq-tvm bench model.hawq --against openvino,onnxruntime --model model.onnx --threads 2

exit codes: 0 ok, 1 a check failed, 2 usage, 3 model or package not supported or not readable
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except HawqError as e:
        if os.environ.get("HAWQ_TVM_DEBUG", "0") != "0":
            raise
        return _fail(args, str(e), e.to_dict(), e.exit_code)
    except KeyboardInterrupt:
        ERR.print("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:  # the last resort: a user never sees a traceback unasked
        if os.environ.get("HAWQ_TVM_DEBUG", "0") != "0":
            raise
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        message = f"internal error ({type(e).__name__}): {first}; set HAWQ_TVM_DEBUG=1 for the traceback and report it"
        return _fail(args, message, {"error": "InternalError", "message": message}, 3)


def _fail(args: argparse.Namespace, message: str, fields: dict[str, Any], code: int) -> int:
    if getattr(args, "json", None) in (True, "-"):
        print(json.dumps({**fields, "exit_code": code}))
    ERR.print(f"hawq-tvm: {message}", markup=False)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hawq-tvm", description="Integer-only inference of quantized networks: compile, run, verify, prove, bench, profile.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hawq-tvm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--quiet", action="store_true", help="no progress on standard error")
        return sub

    def json_flag(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")

    def float_tail(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--allow-float-tail", action="store_true", help="keep float operators before the first or after the last quantized layer")

    def shapes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--shape", action="append", default=[], metavar="NAME=1x3x224x224", help="fix an input's shape; repeatable")

    sub = verb("inspect", _inspect, "what is in a model, and which operators cannot be integer, with reason and remedy")
    sub.add_argument("model")
    float_tail(sub)
    shapes(sub)
    json_flag(sub)

    sub = verb("compile", _compile, "compile a quantized ONNX model into an integer-only package")
    sub.add_argument("model")
    sub.add_argument("-o", "--output", required=True, metavar="PKG", help="the package's folder, by habit NAME.hawq")
    sub.add_argument("--target", default="host", help="host, x86-64-v2, x86-64-v3, x86-64-v4, or 'llvm -mcpu=NAME' (default: host)")
    float_tail(sub)
    shapes(sub)
    json_flag(sub)

    sub = verb("run", _run, "run a package once on inputs from an .npz file")
    sub.add_argument("package")
    sub.add_argument("--inputs", required=True, metavar="IN.npz")
    sub.add_argument("-o", "--output", required=True, metavar="OUT.npz")
    json_flag(sub)

    sub = verb("verify", _verify, "compare every layer of a package with the reference, exactly")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz")
    sub.add_argument("--random", type=int, default=0, metavar="N", help="random inputs (default: 1 when there is no --inputs)")
    sub.add_argument("--seed", type=int, default=0)
    json_flag(sub)

    sub = verb("prove", _prove, "prove that nothing between quantize and dequantize computes in float, and that nothing overflows")
    sub.add_argument("package")
    json_flag(sub)

    sub = verb("bench", _bench, "time a package, alone or beside other runtimes")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz", help="default: random inputs")
    sub.add_argument("--warmup-ms", type=float, default=200, metavar="MS")
    sub.add_argument("--duration", type=float, default=3, metavar="SECONDS")
    sub.add_argument("--iterations", type=int, default=10, metavar="N", help="at least so many")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("--against", metavar="NAMES", help="time it in turns with others: openvino, onnxruntime, torch, or several with commas")
    sub.add_argument("--model", metavar="MODEL.onnx", help="with --against: the model that the package was compiled from")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output")

    sub = verb("profile", _profile, "time every kernel of a package inside real inferences")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz", help="default: random inputs")
    sub.add_argument("--duration", type=float, default=3, metavar="SECONDS")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("--svg", metavar="FILE", help="write a picture of where the time goes")
    sub.add_argument("--overlay", metavar="FILE", help="write the times as node data for Google's Model Explorer")
    sub.add_argument("--model", metavar="MODEL", help="with --overlay: the ONNX model that was compiled, to find every kernel's node")
    json_flag(sub)

    sub = verb("info", _info, "print what a package contains")
    sub.add_argument("package")
    json_flag(sub)
    return parser


# -- helpers -----------------------------------------------------------------------------------------------


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME=1x3x224x224 ... as a dictionary.

    Raises UsageError for anything else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dims = text.rpartition("=")
        if not equals or not name or not re.fullmatch(r"\d+([x,]\d+)*", dims):
            raise UsageError("a shape is not understood", found=text, expected="NAME=1x3x224x224")
        shapes[name] = tuple(int(d) for d in re.split("[x,]", dims))
        if any(d < 1 for d in shapes[name]):
            raise UsageError("a dimension must be at least 1", found=text)
    return shapes


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

    def show(step: str, report: Any) -> None:
        if report is not None:
            rewrites = f"{report.rewrites:>5} rewrites" if report.rewrites else " " * 14
            ERR.print(f"  {step:<18} {rewrites} {report.seconds:8.2f} s", markup=False)

    return show


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _shape_text(entry: dict[str, Any]) -> str:
    return f"{entry['name']}: {entry.get('type', '?')} {'x'.join(str(d) for d in entry['shape']) or 'scalar'}"


# -- the commands --------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    from .inspect import inspect

    with _working(args, "inspecting"):
        report = inspect(args.model, parse_shapes(args.shape), args.allow_float_tail)
    if args.json:
        _print_json(report.to_dict())
        return 0 if report.compilable else 3
    for line in report.lines():
        OUT.print(line, markup=False)
    problems = [*report.unsupported, *report.float_layers]
    if problems:
        table = Table("layer", "operator", "why it cannot be integer", "remedy")
        for p in problems:
            table.add_row(*(str(p.get(k, "")) for k in ("layer", "op", "reason", "remedy")))
        OUT.print(table)
    OUT.print(report.verdict, markup=False)
    return 0 if report.compilable else 3


def _compile(args: argparse.Namespace) -> int:
    from .package import compile as compile_package

    shapes = parse_shapes(args.shape)
    package = compile_package(
        args.model, args.target, shapes=shapes, allow_float_tail=args.allow_float_tail, progress=None if args.json else _progress(args)
    )
    path = package.save(args.output)
    size = sum(f.stat().st_size for f in path.iterdir())
    certificate, rules = package.certificate(), {}
    for row in package.report():
        rules[row["rule"]] = rules.get(row["rule"], 0) + 1
    summary = {
        "package": str(path), "bytes": size, "target": package.manifest["target"], "inputs": package.manifest["inputs"],
        "outputs": package.manifest["outputs"], "kernels_by_rule": rules, "float_tail": package.manifest["float_tail"],
        "integer_only": certificate["ok"], "least_margin": certificate["least_margin"],
        "thresholds": certificate["thresholds"], "differing_thresholds": certificate["differing"],
    }  # fmt: skip
    if args.json:
        _print_json(summary)
        return 0
    for entry in package.manifest["inputs"]:
        OUT.print(f"input   {_shape_text(entry)}", markup=False)
    for entry in package.manifest["outputs"]:
        OUT.print(f"output  {_shape_text(entry)}", markup=False)
    OUT.print(f"kernels {', '.join(f'{n} by {rule}' for rule, n in sorted(rules.items()))}", markup=False)
    if package.manifest["float_tail"]:
        OUT.print(f"FLOAT outside the integer region: {', '.join(package.manifest['float_tail'])}", markup=False)
    _print_proof(certificate)
    OUT.print(f"wrote   {path} ({size / 1e6:.1f} MB)", markup=False)
    return 0


def _print_proof(c: dict[str, Any]) -> None:
    verdict = "integer-only" if c["ok"] else "NOT integer-only"
    OUT.print(
        f"proof   {verdict}: {c['kernels']} kernels, {c['expressions']} TIR expressions, {c['instructions']} machine instructions, "
        f"{len(c['tir_offenders']) + len(c['code_offenders'])} of them float", markup=False,
    )  # fmt: skip
    margin = c["least_margin"]
    if margin:
        OUT.print(f"        least spare accumulator: {margin['spare_bits']} bits in {margin['layer']} ({margin['kind']}, {margin['dtype']})", markup=False)
    OUT.print(f"        {c['differing']} of {c['thresholds']} requantize thresholds differ from the exact real formula", markup=False)
    if c["not_enumerated"]:
        OUT.print(f"        thresholds not enumerated (too many operands): {', '.join(c['not_enumerated'])}", markup=False)


def _run(args: argparse.Namespace) -> int:
    from .files import load_npz, save_npz
    from .package import load

    outputs = load(args.package).run(load_npz(args.inputs))
    path = Path(args.output)
    save_npz(path, outputs)
    if args.json:
        _print_json({"output": str(path), "arrays": {k: {"dtype": str(v.dtype), "shape": list(v.shape)} for k, v in outputs.items()}})
    else:
        for name, value in outputs.items():
            OUT.print(f"{name}: {value.dtype} {'x'.join(str(d) for d in value.shape)}", markup=False)
        OUT.print(f"wrote {path}", markup=False)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .files import load_npz
    from .package import load

    if args.random < 0:
        raise UsageError("the number of random inputs must not be negative", found=str(args.random))
    package = load(args.package)
    given = load_npz(args.inputs) if args.inputs else None
    with _working(args, "verifying every layer"):
        report = package.verify(given, random=args.random, seed=args.seed)
    if args.json:
        _print_json(report.to_dict())
    else:
        table = Table("layer", "elements", "different")
        for row in report.rows:
            table.add_row(row.layer, str(row.elements), str(row.different))
        OUT.print(table)
        OUT.print(report.summary(), markup=False)
    return 0 if report.ok else 1


def _prove(args: argparse.Namespace) -> int:
    from .package import load

    with _working(args, "proving"):
        certificate = load(args.package).prove()
    fields = certificate.to_dict()
    if args.json:
        _print_json(fields)
        return 0 if certificate.ok else 1
    _print_proof(fields)
    OUT.print(f"        border: {', '.join(certificate.border) or 'none'}; roundings: {certificate.roundings}", markup=False)
    for layer, count in certificate.differing_layers.items():
        OUT.print(f"        {count} differing thresholds in {layer}", markup=False)
    for offender in [*certificate.tir_offenders, *certificate.code_offenders]:
        OUT.print(f"  float: {offender}", markup=False)
    return 0 if certificate.ok else 1


def _bench(args: argparse.Namespace) -> int:
    from .files import load_npz, write_text
    from .package import load

    if (args.against is None) != (args.model is None):
        raise UsageError("--against and --model go together", expected="bench PKG --against openvino,onnxruntime --model MODEL.onnx")
    from .bench import against, peers
    from .bench.show import show

    names = [] if args.against is None else peers.parse(args.against)
    package = load(args.package)
    given = load_npz(args.inputs) if args.inputs else None
    options = {"warmup_ms": args.warmup_ms, "duration": args.duration, "iterations": args.iterations, "threads": args.threads}
    with _working(args, "measuring"):
        fields = against.compare(package, args.model, names, given, **options).to_dict() if names else against.alone(package, given, **options)
    if args.json == "-":
        _print_json(fields)
        return 0
    show(OUT, fields)
    if args.json:
        write_text(Path(args.json), json.dumps(fields, indent=2) + "\n")
    return 0


def _profile(args: argparse.Namespace) -> int:
    from .bench import limits
    from .bench.measure import checked_threads
    from .bench.show import show_profile
    from .files import load_npz, write_text
    from .package import load

    if args.model and not args.overlay:
        raise UsageError("--model is for --overlay", remedy="add --overlay FILE")
    package = load(args.package)
    given = load_npz(args.inputs) if args.inputs else None
    with _working(args, "measuring every kernel"):
        count = checked_threads(0, args.duration, 1, args.threads)
        report = package.profile(given, duration=args.duration, threads=count, limit_tops=limits.measure().tops(count))
    if args.svg:
        write_text(Path(args.svg), report.svg())
    if args.overlay:
        write_text(Path(args.overlay), json.dumps(report.overlay(args.model), indent=2) + "\n")
    if args.json:
        _print_json(report.to_dict())
        return 0
    show_profile(report, OUT)
    for path in filter(None, (args.svg, args.overlay)):
        OUT.print(f"wrote {path}", markup=False)
    return 0


def _info(args: argparse.Namespace) -> int:
    from .package import load

    package = load(args.package)
    if args.json:
        _print_json({**package.manifest, "report": package.report()})
        return 0
    target, producer = package.manifest["target"], package.manifest["producer"]
    OUT.print(f"{package.name}: made by hawq-tvm {producer['hawq_tvm']}, tvm {producer['tvm']}, LLVM {producer['llvm']}", markup=False)
    OUT.print(f"target  {target['architecture']} {target.get('mcpu', '')}: {', '.join(target['cpu_features'])}", markup=False)
    for side in ("inputs", "outputs"):
        for entry in package.manifest[side]:
            q = entry.get("quantization")
            detail = f", scale {q['scale'][0]:g}, zero point {q['zero_point'][0]}" if q and len(q["scale"]) == 1 else ""
            OUT.print(f"{side[:-1]:<7} {_shape_text(entry)}{detail}", markup=False)
    _print_proof(package.certificate())
    table = Table("layer", "function", "rule", "tile", "refused before")
    for row in package.report():
        table.add_row(*(str(row[k]) for k in ("layer", "function", "rule", "tile", "refused")))
    OUT.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line's options: what may be asked for, and how it is read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence

from . import __version__
from .errors import UsageError

Command = Callable[[argparse.Namespace], int]
AddVerbs = Callable[[Callable[[str, str], argparse.ArgumentParser]], None]

EXAMPLES = """examples:
  hawq-tvm inspect model.onnx
  hawq-tvm inspect --operators
  hawq-tvm compile model.onnx -o model.hawq --shape input=1x3x224x224
  hawq-tvm compile model.pt2 -o model.hawq
  hawq-tvm tune model.onnx --trials 400 -o model.records.json
  hawq-tvm tune model.onnx --target cuda-sm90 --export candidates
  hawq-tvm tune --import candidates/times.json -o model.records.json
  hawq-tvm compile model.onnx -o model.hawq --records model.records.json
  hawq-tvm run model.hawq --inputs in.npz -o out.npz
  hawq-tvm verify model.hawq --random 4 --seed 0
  hawq-tvm verify avx2.hawq vnni.hawq arm.hawq --inputs in.npz
  hawq-tvm prove model.hawq --json
  hawq-tvm bench model.hawq --threads 1
  hawq-tvm profile model.hawq --threads 1 --svg time.svg
  hawq-tvm allocate float.onnx --calib in.npz --budget bops=0.5 --budget size=6.7MB -o bits.json
  hawq-tvm latency float.onnx -o table.json
  hawq-tvm quantize float.onnx --calib pictures --mean 127 --std 128 --bits bits.json -o q.onnx
  hawq-tvm evaluate model.hawq --data pictures --mean 127 --std 128 --against float.onnx
  hawq-tvm compare-fake w8.onnx w8.hawq w4.onnx w4.hawq --float float.onnx --data in.npz -o figure.svg
  hawq-tvm bench model.hawq --against openvino,onnxruntime --model model.onnx --threads 2
  hawq-tvm bench model_w4.hawq --against model.hawq --threads 1

exit codes: 0 ok, 1 a check failed, 2 an option, an input array or an output path is wrong,
            3 model or package not supported or not readable
"""


def parser(commands: Mapping[str, Command], *groups: AddVerbs) -> argparse.ArgumentParser:
    """The argument parser; commands: the function of every verb; groups: add the options of verbs that are read elsewhere."""
    made = argparse.ArgumentParser(
        prog="hawq-tvm", description="Integer-only inference of quantized networks: compile, tune, run, verify, prove, bench, profile, allocate, quantize, evaluate, compare-fake.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--version", action="version", version=f"hawq-tvm {__version__}")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(command=commands[name])
        sub.add_argument("--quiet", action="store_true", help="no progress on standard error")
        return sub

    def json_flag(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")

    def shapes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--shape", action="append", default=[], metavar="NAME=1x3x224x224", help="fix an input's shape; repeatable")

    def float_tail(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--allow-float-tail", action="store_true", help="keep float operators before the first or after the last quantized layer")

    sub = verb("inspect", "what is in a model, and which operators cannot be integer, with reason and remedy")
    sub.add_argument("model", nargs="?")
    sub.add_argument("--operators", action="store_true", help="print the operators that are known, instead of looking at a model")
    float_tail(sub)
    shapes(sub)
    json_flag(sub)

    sub = verb("compile", "compile a quantized model (ONNX, or a PyTorch .pt2) into an integer-only package")
    sub.add_argument("model")
    sub.add_argument("-o", "--output", required=True, metavar="PKG", help="the package's folder, by habit NAME.hawq")
    sub.add_argument("--target", default="host", help="host, x86-amx, x86-vnni, x86-avxvnni, x86-avx2, x86-64-v2, ..., 'llvm -mcpu=NAME', cuda-sm75, cuda-sm80, cuda-sm86, cuda-sm89, cuda-sm90, or cuda for all of these GPUs (default: host)")
    float_tail(sub)
    sub.add_argument("--records", metavar="FILE", help="use the measured tiles that `tune` wrote to FILE")
    shapes(sub)
    json_flag(sub)

    sub = verb("tune", "measure on this machine which tiles make a model's kernels fast, for compile --records; or on another, with --export and --import")
    sub.add_argument("model", nargs="?")
    sub.add_argument("--target", default="host", help="as for compile; this machine must be able to run it, unless --export is given (default: host)")
    sub.add_argument("--trials", type=int, default=None, metavar="N", help="measure at most N tiles in all (default: 400); with --export, of each distinct layer (default: 24)")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("-o", "--output", metavar="RECORDS.json", help="default: MODEL.records.json in this folder; what it holds is kept, not measured again")
    sub.add_argument("--export", metavar="DIR", help="for a GPU: measure nothing, write the candidates as CUDA source with DIR/run.py, which measures them elsewhere")
    sub.add_argument("--import", metavar="FILE", dest="times", help="make records of the times.json that run.py wrote; with MODEL, only if they are of this model")
    float_tail(sub)
    shapes(sub)
    json_flag(sub)

    sub = verb("run", "run a package once on inputs from an .npz file")
    sub.add_argument("package")
    sub.add_argument("--inputs", required=True, metavar="IN.npz")
    sub.add_argument("-o", "--output", required=True, metavar="OUT.npz")
    json_flag(sub)

    sub = verb("verify", "compare every layer of a package, or of several for different targets, with the reference, exactly")
    sub.add_argument("packages", nargs="+", metavar="PKG", help="packages of one model")
    sub.add_argument("--where-possible", action="store_true", help="of several packages, accept that this machine cannot run all")
    sub.add_argument("--inputs", metavar="IN.npz")
    sub.add_argument("--random", type=int, default=None, metavar="N", help="random inputs (default: 1 when there is no --inputs)")
    sub.add_argument("--seed", type=int, default=0)
    json_flag(sub)

    sub = verb("prove", "prove that nothing between quantize and dequantize computes in float, and that nothing overflows")
    sub.add_argument("package")
    json_flag(sub)

    sub = verb("bench", "time a package, alone or beside other runtimes")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz", help="default: random inputs")
    sub.add_argument("--warmup-ms", type=float, default=200, metavar="MS")
    sub.add_argument("--duration", type=float, default=3, metavar="SECONDS")
    sub.add_argument("--iterations", type=int, default=10, metavar="N", help="at least so many")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("--against", metavar="NAMES", help="time it in turns with others, several with commas: openvino, onnxruntime, torch, torch-bf16, torch-int8, or another package's folder")
    sub.add_argument("--model", metavar="MODEL.onnx", help="with --against, unless it names packages only: the model that the package was compiled from")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output")

    sub = verb("profile", "time every kernel of a package inside real inferences")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz", help="default: random inputs")
    sub.add_argument("--duration", type=float, default=3, metavar="SECONDS")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("--svg", metavar="FILE", help="write a picture of where the time goes")
    sub.add_argument("--overlay", metavar="FILE", help="write the times as node data for Google's Model Explorer")
    sub.add_argument("--model", metavar="MODEL", help="with --overlay: the ONNX model that was compiled, to find every kernel's node")
    json_flag(sub)

    sub = verb("info", "print what a package contains")
    sub.add_argument("package")
    json_flag(sub)
    for add in groups:
        add(verb)
    return made


def check_tune(args: argparse.Namespace) -> None:
    """Refuse options of `tune` that exclude each other.

    Raises UsageError.
    """
    if args.export and args.times:
        raise UsageError("--export and --import are two steps", where="tune", remedy="give one of them; run DIR/run.py between the two")
    if args.model is None and not args.times:
        raise UsageError("takes a model", where="tune", expected="tune MODEL, or tune --import times.json -o RECORDS.json")
    if args.times and args.model is None and not args.output:
        raise UsageError("the records' file has no name", where="tune --import", expected="-o RECORDS.json, or the model")
    given = [name for name, there in (("-o", args.export and args.output), ("--threads", (args.export or args.times) and args.threads is not None), ("--trials", args.times and args.trials is not None)) if there]
    if given:
        raise UsageError(f"{', '.join(given)} has no meaning with --{'export' if args.export else 'import'}", where="tune", remedy="leave it out")


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME=1x3x224x224 ... as a dictionary.

    Raises UsageError for anything else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dims = text.rpartition("=")
        if not equals or not name or not re.fullmatch(r"\d+([x,]\d+)*", dims):
            raise UsageError("a shape is not understood", found=text, expected="NAME=1x3x224x224, with the name of one of the model's inputs")
        if name in shapes:
            raise UsageError("a shape is given twice", where=f"--shape {name}", found=text)
        shapes[name] = tuple(int(d) for d in re.split("[x,]", dims))
        if any(d < 1 for d in shapes[name]):
            raise UsageError("a dimension must be at least 1", found=text)
    return shapes

"""The command line's options: what may be asked for, and how it is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.version import __version__

from .input_options import add_range, add_shape
from .parser import Parser
from .terminal import ERR

if TYPE_CHECKING:
    from hawq_tvm.remote.tracker import Servers

Command = Callable[[argparse.Namespace], int]
AddVerbs = Callable[[Callable[[str, str], argparse.ArgumentParser]], None]

EXAMPLES = """examples:
  hawq-tvm inspect model.onnx
  hawq-tvm inspect --operators
  hawq-tvm compile model.onnx -o model.hawq --shape input=1x3x224x224
  hawq-tvm compile model.pt2 -o model.hawq
  hawq-tvm compile quantized_checkpoint.pth.tar -o model.hawq --network resnet50 --bits bops_0.5
  hawq-tvm tune model.onnx --trials 400 -o model.records.json
  hawq-tvm tune model.onnx --target cuda-sm90 --export candidates
  hawq-tvm tune --import candidates/times.json -o model.records.json
  hawq-tvm compile model.onnx -o model.hawq --records model.records.json
  hawq-tvm run model.hawq --inputs in.npz -o out.npz
  hawq-tvm verify model.hawq --random 4 --seed 0
  hawq-tvm verify avx2.hawq vnni.hawq arm.hawq --inputs in.npz
  hawq-tvm prove model.hawq --json
  hawq-tvm info model.hawq
  hawq-tvm strip model.hawq -o small.hawq
  hawq-tvm pack model.hawq -o model-single.hawq
  hawq-tvm sign model.hawq --key minisign.key
  hawq-tvm bench model.hawq --threads 1
  hawq-tvm profile model.hawq --threads 1 --svg time.svg
  hawq-tvm allocate float.onnx --calib in.npz --budget bops=0.5 --budget size=6.7MB -o bits.json
  hawq-tvm latency float.onnx -o table.json
  hawq-tvm quantize float.onnx --calib pictures --mean 127 --std 128 --bits bits.json -o q.onnx
  hawq-tvm finetune float.onnx --data train.npz --bits W4A4 --epochs 2 -o q.onnx
  hawq-tvm evaluate model.hawq --data pictures --mean 127 --std 128 --against float.onnx
  hawq-tvm compare-fake w8.onnx w8.hawq w4.onnx w4.hawq --float float.onnx --data in.npz -o figure.svg
  hawq-tvm bench model.hawq --against openvino,onnxruntime --model model.onnx --threads 2
  hawq-tvm bench model_w4.hawq --against model.hawq --threads 1
  hawq-tvm bench model.hawq --rpc tracker:9190 --rpc-key pi5
  hawq-tvm tune model.onnx --rpc tracker:9190 --rpc-key pi5 -o model.records.json

exit codes: 0 ok, 1 a check failed, 2 an option, an input array or an output path is wrong,
            3 model or package not supported or not readable, 4 another machine (--rpc) not reached, lost or not suited
"""


READS_MODELS = frozenset(
    {
        "inspect",
        "compile",
        "tune",
        "bench",
        "profile",
        "latency",
        "allocate",
        "quantize",
        "finetune",
        "evaluate",
        "compare-fake",
    }
)


def parser(commands: Mapping[str, Command], *groups: AddVerbs) -> argparse.ArgumentParser:
    """The argument parser; commands: the function of every verb; groups: add the options of verbs that are read
    elsewhere.
    """
    made = Parser(
        prog="hawq-tvm",
        description=(
            "Integer-only inference of quantized networks: compile, tune, run, verify, prove, bench, profile, allocate,"
            " quantize, finetune, evaluate, compare-fake."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"hawq-tvm {__version__}")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(command=commands[name])
        sub.add_argument("--quiet", action="store_true", help="no progress on standard error")
        if name in READS_MODELS:
            sub.add_argument(
                "--trust",
                action="store_true",
                help=(
                    "read PyTorch files in ways that can run code which they hold: only for files whose maker you trust"
                ),
            )
        return sub

    def json_flag(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")

    def float_tail(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--allow-float-tail",
            action="store_true",
            help=(
                "keep float operators before the first or after the last quantized layer; what cannot be compiled of"
                " the latter is cut off into tail.onnx"
            ),
        )

    def nonlinear(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--nonlinear",
            choices=("real", "ibert"),
            help="GELU, softmax and LayerNorm by their formulas, rounded (default), or by I-BERT's polynomials",
        )

    def emulator(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--emulator",
            metavar="COMMAND",
            help=(
                "what runs a package that this CPU cannot run (default, for another architecture: qemu-ARCHITECTURE"
                " -cpu max)"
            ),
        )

    def remote(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument(
            "--rpc", metavar="HOST:PORT", help=f"{what}: the address of TVM's RPC tracker, or of one server"
        )
        sub.add_argument(
            "--rpc-key", metavar="KEY", default=None, help="with --rpc: the key that the servers were started with"
        )
        sub.add_argument(
            "--rpc-timeout",
            type=float,
            metavar="S",
            default=None,
            help=(
                "with --rpc: wait so many seconds for the tracker, for a free server and for each of its answers"
                " (default: 60)"
            ),
        )
        sub.add_argument(
            "--rpc-unchecked",
            action="store_true",
            help="with --rpc: go on where a server cannot say which TVM and which CPU it has",
        )

    def checkpoint(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--network",
            metavar="NAME",
            help=(
                "of a HAWQ checkpoint, where its tensors fit several: resnet18, resnet50, resnet50b, resnet101,"
                " mobilenetv2_w1, inceptionv3"
            ),
        )
        sub.add_argument(
            "--bits",
            metavar="FILE.json|NAME",
            help=(
                "of a HAWQ checkpoint: every layer's bits, or the name of HAWQ's scheme, such as uniform4 or bops_0.5"
                " (default: told by the weights)"
            ),
        )

    sub = verb("inspect", "what is in a model, and which operators cannot be integer, with reason and remedy")
    sub.add_argument("model", nargs="?")
    sub.add_argument(
        "--operators", action="store_true", help="print the operators that are known, instead of looking at a model"
    )
    sub.add_argument("--target", default="host", help="as for compile (default: host)")
    checkpoint(sub)
    float_tail(sub)
    nonlinear(sub)
    add_shape(sub)
    add_range(sub)
    json_flag(sub)

    sub = verb(
        "compile", "compile a quantized model (ONNX, a PyTorch .pt2, a HAWQ checkpoint) into an integer-only package"
    )
    sub.add_argument("model", help="a quantized .onnx or .pt2 file, a HAWQ checkpoint, or the folder of an I-BERT")
    sub.add_argument("-o", "--output", required=True, metavar="PKG", help="the package's folder, by habit NAME.hawq")
    sub.add_argument(
        "--target",
        default="host",
        help=(
            "host, x86-amx, x86-vnni, x86-avxvnni, x86-avx2, x86-64-v2 to -v4, arm-i8mm, arm-dotprod, arm-neon, 'llvm"
            " -mcpu=NAME', cuda-sm75, cuda-sm80, cuda-sm86, cuda-sm89, cuda-sm90, or cuda for all of these GPUs"
            " (default: host)"
        ),
    )
    checkpoint(sub)
    float_tail(sub)
    nonlinear(sub)
    sub.add_argument("--records", metavar="FILE", help="use the measured tiles that `tune` wrote to FILE")
    sub.add_argument("--no-cache", action="store_true", help="compile every kernel, and keep none for the next time")
    add_shape(sub)
    add_range(sub)
    json_flag(sub)

    sub = verb(
        "tune",
        "measure on this machine which tiles make a model's kernels fast, for compile --records; or on another, with"
        " --export and --import",
    )
    sub.add_argument("model", nargs="?")
    sub.add_argument(
        "--target",
        default="host",
        help="as for compile; this machine must be able to run it, unless --export is given (default: host)",
    )
    sub.add_argument(
        "--trials",
        type=int,
        default=None,
        metavar="N",
        help="measure at most N tiles in all (default: 400); with --export, of each distinct layer (default: 24)",
    )
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument(
        "-o",
        "--output",
        metavar="RECORDS.json",
        help="default: MODEL.records.json in this folder; what it holds is kept, not measured again",
    )
    sub.add_argument(
        "--export",
        metavar="DIR",
        help=(
            "for a GPU: measure nothing, write the candidates as CUDA source with DIR/run.py, which measures them"
            " elsewhere"
        ),
    )
    sub.add_argument(
        "--import",
        metavar="FILE",
        dest="times",
        help="make records of the times.json that run.py wrote; with MODEL, only if they are of this model",
    )
    remote(sub, "measure on other machines, all with the key at once")
    checkpoint(sub)
    float_tail(sub)
    add_shape(sub)
    add_range(sub)
    json_flag(sub)

    sub = verb("run", "run a package once on inputs from an .npz file")
    sub.add_argument("package")
    sub.add_argument("--inputs", required=True, metavar="IN.npz")
    sub.add_argument(
        "-o", "--output", metavar="OUT.npz", help="keep the outputs (default: only say what they are like)"
    )
    sub.add_argument(
        "--no-tail",
        action="store_true",
        help="stop where the model's float end was cut off, and write the tensors there instead of its outputs",
    )
    emulator(sub)
    remote(sub, "run on another machine")
    json_flag(sub)

    sub = verb(
        "verify", "compare every layer of a package, or of several for different targets, with the reference, exactly"
    )
    sub.add_argument("packages", nargs="+", metavar="PKG", help="packages of one model")
    sub.add_argument(
        "--where-possible", action="store_true", help="of several packages, accept that this machine cannot run all"
    )
    sub.add_argument(
        "--through",
        choices=("vm", "c"),
        default=None,
        help=(
            "run it by TVM's virtual machine, or by the library's C interface (default: vm; for another architecture c,"
            " there is nothing else)"
        ),
    )
    emulator(sub)
    sub.add_argument(
        "--inputs",
        metavar="IN.npz",
        help="compare on these arrays, called as the model's inputs, one inference or several",
    )
    sub.add_argument(
        "--random", type=int, default=None, metavar="N", help="random inputs (default: 1 when there is no --inputs)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    json_flag(sub)

    sub = verb(
        "prove", "prove that nothing between quantize and dequantize computes in float, and that nothing overflows"
    )
    sub.add_argument("package")
    json_flag(sub)

    sub = verb("bench", "time a package, alone or beside other runtimes")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz", help="default: random inputs")
    sub.add_argument("--warmup-ms", type=float, default=200, metavar="MS")
    sub.add_argument("--duration", type=float, default=3, metavar="SECONDS")
    sub.add_argument("--iterations", type=int, default=10, metavar="N", help="at least so many")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument(
        "--against",
        metavar="NAMES",
        help=(
            "time it in turns with others, several with commas: c (its C interface), openvino, onnxruntime,"
            " openvino-bf16, torch, torch-bf16, torch-int8, or another package's folder"
        ),
    )
    sub.add_argument(
        "--model",
        metavar="MODEL.onnx",
        help="with --against, unless it names c or packages only: the model that the package was compiled from",
    )
    remote(sub, "time it on another machine, by that machine's clock")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output")

    sub = verb("profile", "time every kernel of a package inside real inferences")
    sub.add_argument("package")
    sub.add_argument("--inputs", metavar="IN.npz", help="default: random inputs")
    sub.add_argument("--duration", type=float, default=3, metavar="SECONDS")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    sub.add_argument("--svg", metavar="FILE", help="write a picture of where the time goes")
    sub.add_argument("--overlay", metavar="FILE", help="write the times as node data for Google's Model Explorer")
    sub.add_argument(
        "--model", metavar="MODEL", help="with --overlay: the ONNX model that was compiled, to find every kernel's node"
    )
    json_flag(sub)

    for add in groups:
        add(verb)
    return made


def warn_of_threads(args: argparse.Namespace) -> None:
    """Say that more threads than processors were asked for, on this machine."""
    from hawq_tvm.measure.machine import available_cores

    if args.threads is not None and args.threads > available_cores() and getattr(args, "rpc", None) is None:
        ERR.print(f"warning: {args.threads} threads share {available_cores()} processors: the times say little")


def check_tune(args: argparse.Namespace) -> None:
    """Refuse options of `tune` that exclude each other.

    Raises UsageError.
    """
    if args.export and args.times:
        raise UsageError(
            "--export and --import are two steps",
            where="tune",
            remedy="give one of them; run DIR/run.py between the two",
        )
    if args.model is None and not args.times:
        raise UsageError(
            "takes a model", where="tune", expected="tune MODEL, or tune --import times.json -o RECORDS.json"
        )
    if args.times and args.model is None and not args.output:
        raise UsageError(
            "the records' file has no name", where="tune --import", expected="-o RECORDS.json, or the model"
        )
    given = [
        name
        for name, there in (
            ("-o", args.export and args.output),
            ("--threads", (args.export or args.times) and args.threads is not None),
            ("--trials", args.times and args.trials is not None),
        )
        if there
    ]
    if args.rpc and (args.export or args.times):
        raise UsageError(
            "--rpc measures now", where="tune", remedy=f"leave out --rpc, or --{'export' if args.export else 'import'}"
        )
    if given:
        raise UsageError(
            f"{', '.join(given)} has no meaning with --{'export' if args.export else 'import'}",
            where="tune",
            remedy="leave it out",
        )


def servers(args: argparse.Namespace) -> Servers | None:
    """The machines that --rpc and its fellows mean; None without it.

    Raises UsageError for an address that is none, and for the fellows alone.
    """
    from hawq_tvm.remote.tracker import TIMEOUT, parse

    if args.rpc is None:
        alone = [
            name
            for name, there in (
                ("--rpc-key", args.rpc_key is not None),
                ("--rpc-timeout", args.rpc_timeout is not None),
                ("--rpc-unchecked", args.rpc_unchecked),
            )
            if there
        ]
        if alone:
            raise UsageError(f"{', '.join(alone)} has no meaning without --rpc", expected="--rpc HOST:PORT")
        return None
    return parse(
        args.rpc, args.rpc_key or "", TIMEOUT if args.rpc_timeout is None else args.rpc_timeout, args.rpc_unchecked
    )

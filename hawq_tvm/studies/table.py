"""The benchmark table: quantized networks of the zoo, ours beside OpenVINO and ONNX Runtime, written to
deploy/benchmarks.

    python -m hawq_tvm.studies.table --nets resnet18 --batches 1 --threads 1,2
    python -m hawq_tvm.studies.table --nets none --pairs minilm=minilm.hawq,nncf.onnx,in.npz

Models are made once and kept in --work; packages are compiled anew. A pair is a package and the others' model of the
same float network. Needs the extras `bench` and `torch`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.bench import peers, zoo
from hawq_tvm.core import processes, signals
from hawq_tvm.core.errors import HawqError, UsageError
from hawq_tvm.measure import machine

from .page import write_page

NETS = ("resnet18", "resnet50", "mobilenetv2", "inceptionv3")
PEERS = ("openvino", "onnxruntime", "openvino-bf16")


def prepare(net: str, batch: int, work: Path) -> tuple[Path, Path]:
    """The quantized model of a network, made once, and its package, compiled anew by the code as it is now."""
    model, package = work / f"{net}_b{batch}_qdq.onnx", work / f"{net}_b{batch}.hawq"
    zoo.make(net, model, batch=batch, say=_say)
    _say(f"compiling {model.name}")
    _command("compile", str(model), "-o", str(package), "--quiet")
    return model, package


def measure(
    model: Path, package: Path, threads: int, duration: float, against: Sequence[str], inputs: Path | None = None
) -> dict[str, Any]:
    """One comparison, as `hawq-tvm bench --against --json` writes it.

    In a process of its own, so that no thread pool of another comparison is left. Raises HawqError when the command
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        _command(
            "bench",
            str(package),
            "--against",
            ",".join(against),
            "--model",
            str(model),
            "--threads",
            str(threads),
            "--duration",
            str(duration),
            *(["--inputs", str(inputs)] if inputs else []),
            "--json",
            str(result),
        )
        fields: dict[str, Any] = json.loads(result.read_text())
    return fields


def _command(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hawq_tvm.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HawqError(
            "the command failed", where=f"hawq-tvm {' '.join(arguments)}", **processes.failure(done, "run it alone")
        )


def markdown(rows: Sequence[dict[str, Any]], date: str) -> str:
    """The table as a Markdown page: one line per comparison, a group of columns per engine."""
    first = rows[0]
    m, engines = first["machine"], [e["engine"] for e in first["engines"]]
    versions = ", ".join(f"{e['engine']} {e['version']}" for e in first["engines"])
    lines = [
        f"# Benchmarks on {m['cpu']}, {date}",
        "",
        f"{m['cpu']}, {m['cores']} usable cores, {m['system']}, Python {m['python']}, TVM {m['tvm']}.",
        f"{versions}.",
        "",
        (
            "Made by `make bench`: the same quantized model (QDQ, INT8), the same inputs, threads and processors, the"
            " engines in turns of a"
        ),
        (
            "fraction of a second in one process. Milliseconds of one inference of the whole batch: median, and the"
            " shortest in parentheses."
        ),
        (
            "`ratio` is our median by the fastest other's: below 1 we are faster. TOPS are 10^12 operations per second"
            " of ours at the median, two per"
        ),
        (
            "multiplication, those with a border of zeros included, computed or not; `of limit` is their share of what"
            " this machine's best int8 instruction"
        ),
        (
            "reaches in a loop, times the threads. `others` is the share of the processors' time that other processes"
            " took meanwhile: a row where it is"
        ),
        "large says little, two threads may then have had one processor; `CPU` is the ratio of the medians of the",
        "processors' time, which others disturb less.",
        "",
        f"| network | batch | threads | {' | '.join(engines)} | ratio | CPU | TOPS | of limit | others |",
        f"|---|---|---|{'---|' * len(engines)}---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{e['latency_ms']['median']:.2f} ({e['latency_ms']['min']:.2f})" for e in row["engines"]]
        ours, *others = row["engines"]
        ratio, cpu = (
            ours[kind]["median"] / min(e[kind]["median"] for e in others) for kind in ("latency_ms", "cpu_ms")
        )
        share = "unknown" if ours["share_of_limit"] is None else f"{100 * ours['share_of_limit']:.1f} %"
        cells = [
            row["net"],
            str(row["batch"]),
            str(row["threads"]),
            *times,
            f"{ratio:.2f}",
            f"{cpu:.2f}",
            f"{ours['tops']:.3f}",
            share,
        ]
        lines.append(f"| {' | '.join(cells)} | {100 * row['others_share']:.0f} % |")
    lines += ["", "Outputs beside ours (one line per network and batch):", ""]
    seen = set()
    for row in rows:
        if (row["net"], row["batch"]) not in seen:
            seen.add((row["net"], row["batch"]))
            for e in row["engines"][1:]:
                lines += [
                    f"* {row['net']}, batch {row['batch']}, {e['engine']} ({e['what']}): {text}"
                    for text in e["agreement_text"]
                ]
    peaks = (
        ", ".join(f"{name} {tops:.3f}" for name, tops in first["limits"]["int8_tops_per_core"].items())
        or "not measured on this architecture"
    )
    lines += [
        "",
        (
            f"Limits of one core, measured before the first comparison: int8 TOPS {peaks}; reads"
            f" {first['limits']['l2_read_gb_per_s']:.1f} GB/s from L2, {first['limits']['memory_read_gb_per_s']:.1f}"
            " GB/s from memory."
        ),
        "",
    ]
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], folder: Path, date: str) -> Path:
    """Write the page and the numbers behind it to `folder` as CPU-DATE.md and .json; returns the page's path.

    Raises OutputError when one of them cannot be written.
    """
    return write_page(
        folder,
        str(rows[0]["machine"]["cpu"]),
        date,
        markdown(rows, date),
        json.dumps({"date": date, "results": rows}, indent=1),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__}"  # argparse shows it when a value is wrong
    return parse


def _pair(text: str) -> tuple[str, list[Path]]:
    name, _, paths = text.partition("=")
    found = [Path(p) for p in paths.split(",")]
    if not name or len(found) not in (2, 3):
        raise ValueError
    return name, found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.table", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--nets", type=_list(str), default=list(NETS), metavar="A,B", help=f"default: {','.join(NETS)}")
    parser.add_argument(
        "--pairs",
        type=_pair,
        nargs="+",
        default=[],
        metavar="NAME=PACKAGE,MODEL[,INPUTS]",
        help="packages to time beside a model that others run, after the networks (--nets none: alone)",
    )
    parser.add_argument("--batches", type=_list(_positive), default=[1, 8], metavar="1,8")
    parser.add_argument(
        "--threads",
        type=_list(_positive),
        default=None,
        metavar="1,2",
        help="default: 1, and 2 where there are two cores",
    )
    parser.add_argument(
        "--duration", type=float, default=3, metavar="SECONDS", help="of timed calls per engine (default: 3)"
    )
    parser.add_argument("--against", default=",".join(PEERS), metavar="NAMES", help=f"default: {','.join(PEERS)}")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".bench"),
        metavar="FOLDER",
        help="where models and packages are kept (default: .bench)",
    )
    parser.add_argument("--output", type=Path, default=Path("deploy/benchmarks"), metavar="FOLDER")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: measure, and write the page after every comparison, so that an interruption loses none."""
    args = _parser().parse_args(argv)
    try:
        against = peers.parse(args.against)
        nets = [] if args.nets == ["none"] else args.nets
        unknown = [n for n in nets if n not in zoo.NETWORKS]
        if unknown:
            raise UsageError(
                "no such network in the zoo",
                where="--nets",
                found=", ".join(unknown),
                expected=", ".join(sorted(zoo.NETWORKS)),
            )
        cores = machine.available_cores()
        threads = args.threads or list(range(1, min(2, cores) + 1))
        if max(threads) > cores:
            raise UsageError(
                "every thread needs a processor of its own",
                where="--threads",
                expected=f"at most {cores}",
                found=str(max(threads)),
            )
        rows: list[dict[str, Any]] = []
        date = datetime.date.today().isoformat()
        cases: list[tuple[str, int, list[Path]]] = [(net, batch, []) for net in nets for batch in args.batches]
        for net, batch, paths in [*cases, *((name, 1, given) for name, given in args.pairs)]:
            package, model, *inputs = paths or prepare(net, batch, args.work)[::-1]
            # Only the zoo's networks are there in float.
            beside = [name for name in against if not (paths and name in peers.FLOAT)]
            for count in threads:
                _say(f"measuring {net}, batch {batch}, {count} thread{'s' if count > 1 else ''}")
                found = measure(model, package, count, args.duration, beside, *inputs)
                rows.append({"net": net, "batch": batch, **found})
                page = write(rows, args.output, date)
    except HawqError as e:
        _say(f"table: {e}")
        return e.exit_code
    print(page.read_text())
    _say(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))

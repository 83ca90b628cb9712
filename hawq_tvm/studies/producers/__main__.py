"""Networks of the kinds in the field, each quantized by every producer, and what its file becomes here: one page.

    python -m hawq_tvm.studies.producers --networks yolo,unet --producers ort,nncf

Files are made once and kept in --work, but for those of our own `quantize`. Needs the extra `producers`; a tool that
is not installed is said to be missing on the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, UsageError
from hawq_tvm.core.files import write_text
from hawq_tvm.core.json_files import read_json

from . import page, worker
from .networks import NETWORKS, OPSETS
from .tools import PRODUCERS

OURS = "hawq-tvm"
CHOICES: dict[str, Mapping[str, Any]] = {"networks": NETWORKS, "producers": PRODUCERS, "exporters": OPSETS}


def files(
    work: Path, networks: Sequence[str], producers: Sequence[str], exporters: Sequence[str]
) -> dict[str, tuple[str, str, str, Path]]:
    """Every file of the page by its key: network, exporter ("" for a tool that reads modules), producer, and path."""
    found = {}
    for network in networks:
        for producer in producers:
            tool = PRODUCERS[producer]
            if tool.networks and network not in tool.networks:
                continue
            for exporter in exporters if tool.reads else ("",):
                key = ".".join(filter(None, (network, exporter, producer)))
                found[key] = network, exporter, producer, work / f"{key}.{tool.ending}"
    return found


def study(args: argparse.Namespace) -> int:
    """Make what is missing, judge every file, and write the page after each, so that an interruption loses none."""
    numbers: dict[str, Any] = {"rows": {}}
    if args.resume and args.json.exists():
        numbers = read_json(args.json, "the numbers of an earlier run")
    rows: dict[str, dict[str, Any]] = numbers["rows"]
    numbers["versions"] = {n: PRODUCERS[n].version for n in PRODUCERS}
    args.work.mkdir(parents=True, exist_ok=True)
    for network in args.networks:
        wanted = {k: f for k, f in files(args.work, [network], args.producers, args.exporters).items() if k not in rows}
        for key, (_, _, producer, _) in list(wanted.items()):
            if not PRODUCERS[producer].version:
                rows[key] = {"verdict": page.MISSING, "sentence": f"{PRODUCERS[producer].package} is not installed"}
                del wanted[key]
        _make(network, wanted, rows, args)
        by_path = {str(path): key for key, (*_, path) in wanted.items() if path.exists()}

        def judged(task: worker.Task, found: dict[str, Any], by_path: dict[str, str] = by_path) -> None:
            rows[by_path[task[-1]]] = {**found, **({"state": args.state} if args.state else {})}
            _say(f"{by_path[task[-1]]}: {page.cell(found)}")
            _write(numbers, args)

        worker.run([("inspect" if args.inspect else "judge", network, path) for path in by_path], args.seconds, judged)
    _write(numbers, args)
    _say(f"wrote {args.output}")
    return int(any(not row.get("verified", True) or not row.get("proved", True) for row in rows.values()))


def _make(
    network: str,
    wanted: dict[str, tuple[str, str, str, Path]],
    rows: dict[str, dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """Make the float files and those of every tool that are not there; a failure becomes the row of the file."""
    sources = {exporter: args.work / f"{network}.{exporter}.float.onnx" for exporter in args.exporters}
    tasks: dict[worker.Task, str] = {}
    for exporter, path in sources.items():
        if not path.exists():
            tasks["make", network, exporter, "", "", str(path)] = ""
    for key, (_, exporter, producer, path) in wanted.items():
        if producer == OURS:
            path.unlink(missing_ok=True)
        if not path.exists():
            tasks["make", network, exporter, producer, str(sources.get(exporter, "")), str(path)] = key

    def made(task: worker.Task, found: dict[str, Any]) -> None:
        if found["verdict"] == worker.FAILED:
            Path(task[-1]).unlink(missing_ok=True)
            _say(f"{tasks[task] or task[-1]}: {found['sentence']}")
            if tasks[task]:
                rows[tasks[task]] = {"verdict": page.NOT_MADE, "sentence": found["sentence"]}

    if tasks:
        _say(f"making {len(tasks)} files of {network}")
    worker.run(list(tasks), args.seconds, made)


def _write(numbers: dict[str, Any], args: argparse.Namespace) -> None:
    write_text(args.json, json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    write_text(args.output, page.markdown(numbers))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.producers", description=(__doc__ or "").splitlines()[0]
    )
    for name, known in CHOICES.items():
        parser.add_argument(
            f"--{name}", type=lambda text: text.split(","), default=list(known), metavar="A,B", help=", ".join(known)
        )
    parser.add_argument("--state", default="", metavar="NAME", help="the commit that judges, for the page")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in --json already")
    parser.add_argument("--inspect", action="store_true", help="inspect files only, which builds and runs nothing")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="that one file may take (default: 600)")
    parser.add_argument(
        "--work", type=Path, default=Path(".producers"), metavar="FOLDER", help="of files (default: .producers)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=None,
        metavar="FILE",
        help="the numbers behind the page (default: producers.json in --work)",
    )
    parser.add_argument("--output", type=Path, default=Path("hawq_tvm/docs/producers.md"), metavar="PAGE.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 where a file is not exact or not proved."""
    args = _parser().parse_args(argv)
    args.json = args.json or args.work / "producers.json"
    try:
        for name, known in CHOICES.items():
            unknown = [n for n in getattr(args, name) if n not in known]
            if unknown:
                raise UsageError(
                    "is not known here", where=f"--{name}", found=", ".join(unknown), expected=", ".join(known)
                )
        return study(args)
    except HawqError as e:
        _say(f"producers: {e}")
        return e.exit_code


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))

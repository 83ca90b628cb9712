"""The tables of what `make gpu-check` measured: a page for deploy/benchmarks and a short table for docs/numbers.md.

python -m hawq_tvm.studies.gpu_table gpu.json      writes deploy/benchmarks/GPU-DATE.md, .json; prints the short table
python -m hawq_tvm.studies.gpu_table               prints the short table with nothing measured
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import HawqError, InputError

from .page import write_page

NETS, PRECISIONS, BATCHES = (
    ("resnet18", "resnet50", "mobilenetv2", "inceptionv3"),
    ("w8a8", "w4a8", "w4a4"),
    (1, 8, 32, 128),
)
PEERS = {
    "eager-fp32": "torch eager fp32",
    "eager-fp16": "torch eager fp16",
    "compile-fp16-channels-last": "torch.compile fp16",
}
NONE = "not measured"


def read(path: Path) -> dict[str, Any]:
    """The report of a gpu-check.

    Raises InputError for anything else.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError("cannot be read as the JSON of gpu-check", where=str(path), found=str(e)) from e
    if not isinstance(report, dict) or not {"machine", "entries", "bundle"} <= report.keys():
        raise InputError(
            "is not the JSON of gpu-check", where=str(path), expected="what `make gpu-check OUT=FILE` writes"
        )
    return report


def _entry(report: Mapping[str, Any], net: str, precision: str, batch: int) -> str | None:
    """The name of the entry that is timed: of the largest images."""
    found = [e for e in report.get("entries", ()) if (e["net"], e["precision"], e["batch"]) == (net, precision, batch)]
    return max(found, key=lambda e: e["size"])["name"] if found else None


def _best(row: Mapping[str, Any] | None) -> float | None:
    """Milliseconds: of the graph, else of the kernels launched one by one."""
    if not row:
        return None
    return float((row.get("graph") or row["launched"])["median_ms"])


def _ours(report: Mapping[str, Any], net: str, precision: str, batch: int) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report.get("time", {}).get(_entry(report, net, precision, batch))
    return found


def _peer(report: Mapping[str, Any], net: str, batch: int, peer: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report.get("peer", {}).get(f"{net}-b{batch}/{peer}")
    return found


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def short(report: Mapping[str, Any]) -> str:
    """The short table: milliseconds of a whole batch, ours and torch.compile's, for every network and precision."""
    lines = [
        f"| network | precision | {' | '.join(f'batch {b}' for b in BATCHES)} |",
        f"|---|---|{'---|' * len(BATCHES)}",
    ]
    for net in NETS:
        for precision in PRECISIONS:
            cells = [_ms(_best(_ours(report, net, precision, b))) for b in BATCHES]
            lines.append(f"| {net} | {precision.upper()} | {' | '.join(cells)} |")
        cells = [_ms(_best(_peer(report, net, b, "compile-fp16-channels-last"))) for b in BATCHES]
        lines.append(f"| {net} | torch.compile fp16 | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(report: Mapping[str, Any]) -> str:
    """The page of deploy/benchmarks: machine, exactness, times beside PyTorch's, the device's limits, what is
    missing.
    """
    m, limits = report["machine"], report.get("limits", {}).get("limits") or {}
    gpu = m.get("gpu", "no GPU")
    verified = report.get("verify", {})
    wrong = {name: row["first_difference"] for name, row in verified.items() if not row["ok"]}
    exact = (
        f"{len(verified) - len(wrong)} of {len(verified)} libraries exact,"
        f" {sum(r['elements'] for r in verified.values())} elements compared."
    )
    lines = [
        f"# Benchmarks on {gpu}, {report['date']}",
        "",
        (
            f"{gpu}, driver for CUDA {m.get('driver_cuda', 'unknown')}, {m['cpu']}, {m['cores']} cores, {m['system']},"
            f" Python {m['python']}, PyTorch {m.get('torch', 'not installed')};"
        ),
        (
            f"libraries by TVM {report['producer']['tvm']} and nvcc {report['producer'].get('cuda', 'unknown')} for"
            f" {report['target']}."
        ),
        "",
        (
            "Made by `make gpu-check`. Milliseconds of one inference of the whole batch on the GPU, medians with"
            " percentiles 10 and 90, between events, launches queued ahead,"
        ),
        (
            "inputs rotated past the second-level cache (at batch 1 as far as 128 inputs go). `graph`: one CUDA graph;"
            " `launched`: kernel by kernel. PyTorch's figures are its CUDA"
        ),
        (
            "graphs of torchvision's float networks (ResNet-50 and InceptionV3 are torchvision's variants). `ratio` is"
            " torch.compile's time by ours. Ours are timed with dense random"
        ),
        "weights, and verified with weights of which one in 16 to 64 is not zero in larger layers.",
        "",
        f"{exact}",
        *(f"* NOT EXACT: {name}: {text}" for name, text in wrong.items()),
        "",
        (
            f"Limits, measured: int8 {limits.get('int8_tops') or NONE} TOPS ({limits.get('int8', NONE)}); memory"
            f" {limits.get('memory_gb_per_s', NONE)} GB/s ({limits.get('memory', NONE)})."
        ),
        "",
        (
            f"| network | precision | batch | graph | launched | TOPS | of limit | {' | '.join(PEERS.values())} | ratio"
            " | exact |"
        ),
        f"|{'---|' * (9 + len(PEERS))}",
    ]
    for net in NETS:
        for precision in PRECISIONS:
            lines += [_row(report, net, precision, batch, limits.get("int8_tops")) for batch in BATCHES]
    lines += ["", *_products(report)]
    for title, names in (
        ("Left out, because the time was over", report.get("left_out", [])),
        ("Failed", [f"{k} ({v})" for k, v in report.get("failed", {}).items()]),
    ):
        if names:
            lines += [f"{title}: {', '.join(names)}.", ""]
    return "\n".join(lines)


def _row(report: Mapping[str, Any], net: str, precision: str, batch: int, limit: float | None) -> str:
    ours = _ours(report, net, precision, batch)
    best, peers = _best(ours), {p: _best(_peer(report, net, batch, p)) for p in PEERS}
    compiled = peers["compile-fp16-channels-last"]
    tops = ours["tops"] if ours else None
    checked = report.get("verify", {}).get(_entry(report, net, precision, batch))
    cells = [
        net,
        precision.upper(),
        str(batch),
        *(_spread(ours.get(k) if ours else None) for k in ("graph", "launched")),
        NONE if tops is None else f"{tops:.1f}",
        NONE if tops is None or not limit else f"{100 * tops / limit:.1f} %",
        *map(_ms, peers.values()),
        NONE if not best or not compiled else f"{compiled / best:.2f}",
        "not verified" if checked is None else "yes" if checked["ok"] else "NO",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(row: Mapping[str, Any] | None) -> str:
    return NONE if not row else f"{row['median_ms']:.3f} ({row['p10_ms']:.3f} to {row['p90_ms']:.3f})"


def _products(report: Mapping[str, Any]) -> list[str]:
    """1x1 convolutions beside `torch._int_mm` of the same matrices, microseconds; ours with its epilogue."""
    lines = ["| library | m x n x k | ours | torch._int_mm |", "|---|---|---|---|"]
    for name, found in sorted(report.get("products", {}).items()):
        times = {
            "x".join(map(str, r["matrix"])): r["us"] for r in report.get("layers", {}).get(name, ()) if "matrix" in r
        }
        for shape, theirs in found.items():
            lines.append(f"| {name} | {shape} | {times.get(shape, NONE)} | {theirs.get('us', 'refused')} |")
    return [*lines, ""] if len(lines) > 2 else []


def write(report: Mapping[str, Any], folder: Path) -> Path:
    """Write the page and the numbers behind it as GPU-DATE.md and .json; returns the page's path.

    Raises OutputError when one of them cannot be written.
    """
    return write_page(
        folder,
        str(report["machine"].get("gpu", "cpu")),
        report["date"],
        page(report),
        json.dumps(report, indent=1, sort_keys=True),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command: write the page and print the short table."""
    parser = argparse.ArgumentParser(
        prog="python -m hawq_tvm.studies.gpu_table", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "report", nargs="?", type=Path, metavar="gpu.json", help="what gpu-check wrote (default: nothing measured)"
    )
    parser.add_argument("--output", type=Path, default=Path("deploy/benchmarks"), metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        report = read(args.report) if args.report else {}
        if report:
            print(f"wrote {write(report, args.output)}", file=sys.stderr)
    except HawqError as e:
        print(f"gpu-table: {e}", file=sys.stderr)
        return e.exit_code
    print(short(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

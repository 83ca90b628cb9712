"""Measurements as a person reads it in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from hawq_tvm.measure.profile import KernelRow, ProfileReport

from .terminal import WIDE, Grid, Terminal


def show(out: Terminal, fields: dict[str, Any]) -> None:
    """Print a measurement, alone or beside others, from its JSON fields."""
    m, found = fields["machine"], fields["limits"]
    if "gpu" in m:
        return _show_gpu(out, fields)
    if "rpc" in fields:
        there = fields["rpc"]
        out.print(
            f"{fields['name']}: {m['cpu']} ({m['architecture']}), tvm {m['tvm']}, key {there['key'] or 'none'}, server"
            f" {there['server']}; times by its clock"
        )
    else:
        out.print(f"{fields['name']}: {m['cpu']}, {m['cores']} cores, {m['system']}, tvm {m['tvm']}")
    if "engines" in fields:
        out.print(
            f"threads {fields['threads']} on processors {fields['pinned_to']}, {fields['turns']} turns each; other"
            f" processes took {100 * fields['others_share']:.0f} % of their time"
        )
        numbers = ("median ms", "min", "p95", "ratio", "min ratio", "CPU ms", "TOPS", "of limit")
        table = Grid("engine", *(Column(name, justify="right") for name in numbers), box=SIMPLE_HEAD, pad_edge=False)
        for e in fields["engines"]:
            ms = e["latency_ms"]
            table.add_row(
                Path(e["engine"]).name,
                *(f"{ms[k]:.3f}" for k in ("median", "min", "p95")),
                f"{e['ratio_to_fastest']:.2f}",
                f"{e['ratio_of_minima']:.2f}",
                f"{e['cpu_ms']['median']:.3f}",
                f"{e['tops']:.3f}",
                _share(e),
            )
        out.print(table)
        for e in fields["engines"]:
            out.print(f"{e['engine']} {e['version']} ran {e['what']}")
            for row in e["agreement_text"]:
                out.print(f"  beside ours: {row}")
        for e in fields["excluded"]:
            out.print(f"left out: {e['engine']}: {e['reason']}")
    else:
        out.print(
            f"threads {fields['threads']}, {fields['iterations']} iterations after {fields['warmup_ms']:g} ms of"
            " warm-up"
        )
        out.print("latency ms: " + "  ".join(f"{k} {v:.3f}" for k, v in fields["latency_ms"].items()))
        out.print(f"throughput: {fields['throughput_per_s']:.1f} inferences/s")
        out.print(f"speed: {fields['tops']:.3f} TOPS" + (f", {_share(fields)} of the limit" if found else ""))
    if found is None:
        return
    peaks = (
        ", ".join(f"{name} {tops:.3f}" for name, tops in found["int8_tops_per_core"].items())
        or "not measured on this architecture"
    )
    out.print(
        f"limits of one core, measured: int8 TOPS {peaks}; reads {found['l2_read_gb_per_s']:.1f} GB/s from L2, "
        f"{found['memory_read_gb_per_s']:.1f} GB/s from memory; 'of limit' is against the best TOPS x threads"
    )


def _show_gpu(out: Terminal, fields: dict[str, Any]) -> None:
    m, found = fields["machine"], fields["limits"]
    out.print(f"{fields['name']}: {m['gpu']}, driver for CUDA {m['driver_cuda']}, {m['system']}, tvm {m['tvm']}")
    rotated = (
        f"{fields['inputs_rotated']} inputs of {fields['bytes_rotated'] / 1e6:.1f} MB in all in turns, the second-level"
        f" cache holds {m['l2_bytes'] / 1e6:.1f}"
    )
    out.print(f"times on the GPU (events) after {fields['warmup_ms']:g} ms of warm-up; {rotated}")
    for name, what in (("graph", "as one CUDA graph"), ("launched", "kernel by kernel")):
        row = fields[name]
        if row is None:
            out.print(f"{what}: not measured: {fields['graph_error']}")
        else:
            out.print(
                f"{what}: median {row['median_ms']:.4f} ms, p10 {row['p10_ms']:.4f}, p90 {row['p90_ms']:.4f},"
                f" {row['iterations']} iterations"
            )
    out.print(f"speed: {fields['tops']:.3f} TOPS, {_share(fields)} of the limit")
    known = found["int8_tops"] is not None
    out.print(
        f"limits, measured: int8 {found['int8_tops']} TOPS, memory {found['memory_gb_per_s']} GB/s"
        if known
        else f"limits: not measured: {found.get('why', found.get('int8_error'))}"
    )


def _share(fields: dict[str, Any]) -> str:
    share = fields["share_of_limit"]
    return "unknown" if share is None else f"{100 * share:.1f} %"


def show_profile(report: ProfileReport, out: Terminal) -> None:
    """Print the machine, the kernels slowest first, the parts of the latency, and the totals."""
    m = report.machine
    out.print(f"{report.name}: {m['cpu']}, {m['cores']} cores, {m['system']}, tvm {m['tvm']}")
    out.print(
        f"threads {report.threads}, medians of {report.iterations} inferences after {report.warmup_ms:g} ms of warm-up"
    )
    limited = report.limit_tops is not None
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("ms", "share", "GOP", "TOPS", *(["of limit"] if limited else []), "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("layer", "rule", "tile"):
        table.add_column(column, no_wrap=True)
    for row in report.by_time:
        table.add_row(*_cells(row, limited))
    # A layer's name cut to a narrow terminal would name no layer: the numbers come first and lines may be longer than
    # it is wide.
    wide = Terminal(
        file=out.file, width=max(out.width, out.measure(table, options=out.options.update(width=WIDE)).maximum)
    )
    wide.print(table)
    parts = report.parts()
    longest = max(len(name) for name, _, _ in parts)
    for name, ms, count in parts:
        kernels = f"  {count} kernel{'s' * (count != 1)}" if count else ""
        out.print(f"{name:<{longest}} {ms:9.4f} ms {ms / report.latency_ms:6.1%}{kernels}")
    out.print(
        f"{'total':<{longest}} {report.latency_ms:9.4f} ms         {report.gop:.4g} GOP, {report.tops:.3g} TOPS; "
        f"the instrument's {report.instrument_us:.2f} us per kernel are not in these times"
    )


def _cells(row: KernelRow, limited: bool) -> list[str]:
    work = [f"{row.gop:.4f}" if row.products else "", "" if row.tops is None else f"{row.tops:.3f}"]
    limit = ["" if row.share_of_limit is None else f"{row.share_of_limit:.1%}"] if limited else []
    times = [f"{row.median_ms:.4f}", f"{row.share:.1%}"]
    return [*times, *work, *limit, f"{row.bytes / 1e6:.3f}", row.layer, row.rule, row.tile]

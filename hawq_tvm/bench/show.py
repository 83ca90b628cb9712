"""A measurement as a person reads it in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(out: Console, fields: dict[str, Any]) -> None:
    """Print a measurement, alone or beside others, from its JSON fields."""
    m, found = fields["machine"], fields["limits"]
    out.print(f"{fields['name']}: {m['cpu']}, {m['cores']} cores, {m['system']}, tvm {m['tvm']}", markup=False)
    if "engines" in fields:
        out.print(f"threads {fields['threads']} on processors {fields['pinned_to']}, {fields['turns']} turns each; other processes took {100 * fields['others_share']:.0f} % of their time", markup=False)
        table = Table("engine", "median ms", "min", "p95", "ratio", "min ratio", "TOPS", "of limit")
        for e in fields["engines"]:
            ms = e["latency_ms"]
            table.add_row(
                e["engine"], *(f"{ms[k]:.3f}" for k in ("median", "min", "p95")), f"{e['ratio_to_fastest']:.2f}",
                f"{e['ratio_of_minima']:.2f}", f"{e['tops']:.3f}", _share(e),
            )  # fmt: skip
        out.print(table)
        for e in fields["engines"]:
            out.print(f"{e['engine']} {e['version']} ran {e['what']}", markup=False)
            for row in e["agreement_text"]:
                out.print(f"  beside ours: {row}", markup=False)
    else:
        out.print(f"threads {fields['threads']}, {fields['iterations']} iterations after {fields['warmup_ms']:g} ms of warm-up", markup=False)
        out.print("latency ms: " + "  ".join(f"{k} {v:.3f}" for k, v in fields["latency_ms"].items()), markup=False)
        out.print(f"throughput: {fields['throughput_per_s']:.1f} inferences/s", markup=False)
        out.print(f"speed: {fields['tops']:.3f} TOPS, {_share(fields)} of the limit", markup=False)
    peaks = ", ".join(f"{name} {tops:.3f}" for name, tops in found["int8_tops_per_core"].items()) or "not measured on this architecture"
    out.print(
        f"limits of one core, measured: int8 TOPS {peaks}; reads {found['l2_read_gb_per_s']:.1f} GB/s from L2, "
        f"{found['memory_read_gb_per_s']:.1f} GB/s from memory; 'of limit' is against the best TOPS x threads", markup=False,
    )  # fmt: skip


def _share(fields: dict[str, Any]) -> str:
    share = fields["share_of_limit"]
    return "unknown" if share is None else f"{100 * share:.1f} %"

"""The compile report: which rule made each kernel, with which tile and where that comes from, and why the others
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx

FIELDS = ("layer", "rule", "tile", "tile_from", "refused")
USAGE = "hawq.usage"


def report(module: tvm.IRModule) -> list[dict[str, Any]]:
    """One entry per PrimFunc of a TIR module: function, layer, rule, tile, tile_from, refused (a sentence per
    earlier rule).

    tile_from: "record" of a measurement, "cost model", or "rule" where a rule has a single tile.  usage: on a GPU,
    for each of its kernels and architectures the registers of a thread, the bytes spilled and kept on its stack, and
    the shared memory of a block.
    """
    entries = []
    for gv, func in sorted(module.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, tirx.PrimFunc):
            attrs = func.attrs or {}
            entry: dict[str, Any] = {"function": gv.name_hint} | {k: str(attrs.get(f"hawq.{k}", "")) for k in FIELDS}
            if USAGE in attrs:
                entry["usage"] = json.loads(str(attrs[USAGE]))
            entries.append(entry)
    return entries


def device_kernels(function: str) -> re.Pattern[str]:
    """The names that TVM gives to the GPU kernels of a PrimFunc."""
    return re.compile(rf"{re.escape(function)}_kernel(_\d+)?")


def with_usage(module: tvm.IRModule, usage: Sequence[Mapping[str, Any]]) -> tvm.IRModule:
    """A TIR module whose PrimFuncs carry what their GPU kernels take: one entry per "kernel" and architecture."""
    if not usage:
        return module
    new = module.clone()
    for gv, func in module.functions_items():
        if isinstance(func, tirx.PrimFunc):
            name = device_kernels(gv.name_hint)
            own = [dict(u) for u in usage if name.fullmatch(str(u["kernel"]))]
            new.update_func(gv, func.with_attr(USAGE, json.dumps(own, sort_keys=True)))
    return new

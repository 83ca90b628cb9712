"""The compile report: which rule made each kernel, with which tile and where that comes from, and why the others refused."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

FIELDS = ("layer", "rule", "tile", "tile_from", "refused")


def report(module: tvm.IRModule) -> list[dict[str, Any]]:
    """One entry per PrimFunc of a TIR module: function, layer, rule, tile, tile_from, refused (a sentence per earlier rule).

    tile_from: "record" of a measurement, "cost model", or "rule" where a rule has a single tile.
    """
    entries = []
    for gv, func in sorted(module.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, tirx.PrimFunc):
            attrs = func.attrs or {}
            entries.append({"function": gv.name_hint} | {k: str(attrs.get(f"hawq.{k}", "")) for k in FIELDS})
    return entries

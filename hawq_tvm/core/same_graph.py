"""Whether two integer graphs compute the same."""

from __future__ import annotations

import tvm
import tvm_ffi


def same_graph(a: tvm.IRModule, b: tvm.IRModule) -> bool:
    """Whether two integer graphs (PACKED stage) compute the same: equal operators and constants; the tiles that
    records chose do not count.
    """
    return bool(tvm_ffi.structural_equal(_without_records(a), _without_records(b), map_free_vars=True))


def _without_records(module: tvm.IRModule) -> tvm.IRModule:
    return tvm.IRModule({gv.name_hint: f.without_attr("hawq.record") for gv, f in module.functions_items()})

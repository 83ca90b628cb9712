"""Write the integer graph's own hash on its `main` (INTEGER -> INTEGER), before anything is chosen for a target.

Packages for different targets that carry the same hash (manifest: `graph_sha256`) came from the same integers: the
same model, the same arithmetic, the same version of TVM.  Layout, packing, tiles and fusion come later and differ.
"""

from __future__ import annotations

import hashlib

import tvm

from hawq_tvm.core.serialized import serialized

ATTRIBUTE = "hawq.graph_sha256"


def name_graph(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with the SHA-256 of its serialized form, in hexadecimal, as an attribute of `main`; a hash that is
    there is replaced.
    """
    bare = tvm.IRModule({gv.name_hint: f.without_attr(ATTRIBUTE) for gv, f in module.functions_items()})
    named = {gv.name_hint: f for gv, f in bare.functions_items()}
    digest = hashlib.sha256()
    for piece in serialized(bare).whole():
        digest.update(piece)
    named["main"] = named["main"].with_attr(ATTRIBUTE, digest.hexdigest())
    return tvm.IRModule(named), 1

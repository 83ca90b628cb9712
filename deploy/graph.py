"""The integer graph as files of a package: graph.json, constants.npz, graph.txt; needs TVM, which the rest of a
package does not.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm

from hawq_tvm.core.serialized import serialized

from .package import dump_json


def graph_files(module: tvm.IRModule) -> dict[str, bytes]:
    """graph.json, constants.npz and graph.txt of a module."""
    found = serialized(module)
    graph = json.loads(found.text)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for node in graph["nodes"]:
        if node["type"] == "ffi.Tensor":
            tensor = found.tensor(node["data"])
            if tensor is not None:
                name = f"c{len(arrays)}"
                arrays[name] = tensor.data
                node["data"] = {"header": base64.b64encode(tensor.header).decode(), "constant": name}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return {
        "graph.json": dump_json(graph),
        "constants.npz": buffer.getvalue(),
        "graph.txt": (module.script() + "\n").encode(),
    }


def load_graph(files: Mapping[str, bytes]) -> tvm.IRModule:
    """The module of graph.json and constants.npz, equal to the one that was saved."""
    graph = json.loads(files["graph.json"])
    with np.load(io.BytesIO(files["constants.npz"]), allow_pickle=False) as arrays:
        for node in graph["nodes"]:
            if node["type"] == "ffi.Tensor" and isinstance(node["data"], dict):
                raw = base64.b64decode(node["data"]["header"]) + arrays[node["data"]["constant"]].tobytes()
                node["data"] = base64.b64encode(raw).decode()
    return tvm.ir.load_json(json.dumps(graph))

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

from .package import dump_json

# Constants up to this many bytes stay in graph.json, where they can be read.
SMALL_CONSTANT = 64


def graph_files(module: tvm.IRModule) -> dict[str, bytes]:
    """graph.json, constants.npz and graph.txt of a module."""
    graph = json.loads(tvm.ir.save_json(module))
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for node in graph["nodes"]:
        if node["type"] == "ffi.Tensor":
            raw = base64.b64decode(node["data"])
            header, data = _split_tensor(raw)
            if len(data) > SMALL_CONSTANT:
                name = f"c{len(arrays)}"
                arrays[name] = np.frombuffer(data, np.uint8)
                node["data"] = {"header": base64.b64encode(header).decode(), "constant": name}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return {
        "graph.json": dump_json(graph),
        "constants.npz": buffer.getvalue(),
        "graph.txt": (module.script() + "\n").encode(),
    }


def _split_tensor(raw: bytes) -> tuple[bytes, bytes]:
    """A serialized tensor as (header, data): the header ends with the data's length in bytes."""
    rank = int.from_bytes(raw[24:28], "little")
    end = 32 + 8 * rank + 8
    return raw[:end], raw[end:]


def load_graph(files: Mapping[str, bytes]) -> tvm.IRModule:
    """The module of graph.json and constants.npz, equal to the one that was saved."""
    graph = json.loads(files["graph.json"])
    with np.load(io.BytesIO(files["constants.npz"]), allow_pickle=False) as arrays:
        for node in graph["nodes"]:
            if node["type"] == "ffi.Tensor" and isinstance(node["data"], dict):
                raw = base64.b64decode(node["data"]["header"]) + arrays[node["data"]["constant"]].tobytes()
                node["data"] = base64.b64encode(raw).decode()
    return tvm.ir.load_json(json.dumps(graph))

"""One entry of the GPU bundle: a library without its large constants, and the integers that the reference says its
layers compute.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

import schedules
from deploy.gpu_check import compare
from deploy.gpu_check.noise import image
from hawq_tvm.compiler.pipeline import Compiled
from hawq_tvm.core import ops, stages, work
from hawq_tvm.core.errors import PackageError
from hawq_tvm.verify.compare import layer_calls
from hawq_tvm.verify.reference import evaluate

Array = NDArray[Any]
LEAST = 4096  # bytes from which a constant of weights lies outside the library


@dataclass
class Entry:
    """A library and what must be known to check and time it.

    library: with zeros in the place of `constants`, which are kept by their SHA-256.  fields: JSON-ready, see
    deploy/gpu_check/bundle.py.
    """

    library: bytes
    fields: dict[str, Any]
    constants: dict[str, bytes] = field(default_factory=dict)


def make(compiled: Compiled, seeds: Sequence[int], samples: Sequence[Mapping[str, Any]], **about: Any) -> Entry:
    """The entry of a compiled model whose inputs' first axis counts images.

    seeds: of the images that its batch repeats.  samples: `expected_layers` of the same network.  about: further
    fields.
    Raises PackageError when its layers are not those of `samples`, or a constant is not in the library.
    """
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        path = Path(folder) / "model.so"
        compiled.executable.export_library(str(path))
        library, holes, constants = without_constants(path.read_bytes(), weights(compiled.tir))
    graph = compiled.packed
    batch = ops.shape_of(graph["main"].params[0])[0]
    layers = _layers(graph)
    found = [(layer["layer"], [r["shape"] for r in layer["results"]]) for layer in layers]
    wanted = [(s["layer"], [[batch, *r["shape"]] for r in s["results"]]) for s in samples]
    if found != wanted:
        odd = next(
            (f"{a} beside {b}" for a, b in zip(found, wanted) if a != b), f"{len(found)} beside {len(wanted)} layers"
        )
        raise PackageError(
            "the layers are not those of the network that gave the expected integers",
            where=str(about.get("name", "")),
            found=odd,
        )
    rules = {row["layer"]: row for row in schedules.report(compiled.tir)}
    rows = []
    for layer in layers:
        del layer["results"]
        rows.append(
            {**layer, **{k: str(rules[layer["layer"]][k]) for k in ("rule", "tile") if layer["layer"] in rules}}
        )
    fields = {
        **about,
        "batch": batch,
        "inputs": [
            {"name": p.name, "shape": list(ops.shape_of(p)), "seeds": list(seeds)} for p in graph["main"].params
        ],
        "samples": len(seeds),
        "layers": rows,
        "holes": holes,
        "products": work.products(graph),
    }
    return Entry(library, fields, constants)


def _layers(graph: tvm.IRModule) -> list[dict[str, Any]]:
    """Name, kernel, results and multiplications of every layer, in the order of execution; 1x1 convolutions with
    their matrix product.
    """
    made = []
    for b in layer_calls(graph):
        function = graph[b.value.op]
        results = list(b.var.ty.fields) if isinstance(b.var.ty, relax.TupleType) else [b.var.ty]
        row: dict[str, Any] = {
            "layer": b.var.name,
            "kernel": str(function.attrs["global_symbol"])
            if function.attrs and "global_symbol" in function.attrs
            else b.value.op.name_hint,
            "results": [{"dtype": str(t.dtype), "shape": [int(d) for d in t.shape.values]} for t in results],
            "products": work.layer_products(function),
        }
        product = next((m for i in stages.bindings(function) if (m := _matrix(i.value)) is not None), None)
        made.append({**row, **({"matrix": product} if product else {})})
    return made


def _matrix(call: relax.Expr) -> list[int] | None:
    """[m, n, k] of a 1x1 convolution of stride 1 in one group."""
    if ops.op_name(call) != "relax.nn.conv2d" or str(call.attrs.kernel_layout) != "HWIO":
        return None
    kh, kw, k, n = ops.shape_of(call.args[1])
    if (kh, kw) != (1, 1) or int(call.attrs.groups) != 1 or any(int(s) != 1 for s in call.attrs.strides):
        return None
    return [int(np.prod(ops.shape_of(call)[:3])), n, k]


def expected_layers(graph: tvm.IRModule, seeds: Sequence[int], whole: bool) -> list[dict[str, Any]]:
    """What the reference says every layer computes of images, in the form of deploy/gpu_check/compare.py.

    graph: PACKED; its batch is 1 or the number of seeds.  whole: keep every element, else hashes of large results.
    """
    params, calls = graph["main"].params, layer_calls(graph)
    together = ops.shape_of(params[0])[0] == len(seeds)
    runs: list[list[tuple[Array, ...]]] = []
    for group in [list(seeds)] if together else [[s] for s in seeds]:
        values: list[Any] = []
        given = {p.name: np.concatenate([image(s, (1, *ops.shape_of(p)[1:])) for s in group]) for p in params}
        evaluate(graph, given, partial(_keep, values))
        known = {b.var: v for b, v in zip(stages.bindings(graph["main"]), values, strict=True)}
        runs.append([v if isinstance(v := known[b.var], tuple) else (v,) for b in calls])
    rows = []
    for i, b in enumerate(calls):
        results = []
        for j in range(len(runs[0][i])):
            arrays = [run[i][j] for run in runs]
            results.append(compare.expected([a[k : k + 1] for a in arrays for k in range(a.shape[0])], whole))
        rows.append({"layer": b.var.name, "results": results})
    return rows


def _keep(values: list[Any], _: str, value: Any) -> None:
    values.append(value)


def weights(tir: tvm.IRModule) -> list[Array]:
    """The large 8-bit constants of a TIR-stage module."""
    found = []
    for b in stages.bindings(tir["main"]):
        if isinstance(b.value, relax.Call) and ops.op_name(b.value) == "relax.call_tir":
            values = [ops.const_value(a) for a in b.value.args[1].fields if ops.is_const(a)]
            found += [v for v in values if v.dtype in (np.int8, np.uint8) and v.nbytes >= LEAST]
    return found


def without_constants(library: bytes, values: Sequence[Array]) -> tuple[bytes, list[dict[str, Any]], dict[str, bytes]]:
    """A library with zeros in the place of constants, the places, and the constants by their hash.

    Raises PackageError for a constant that the library does not hold.
    """
    left, holes, constants = bytearray(library), [], {}
    for value in values:
        data = np.ascontiguousarray(value).tobytes()
        digest = hashlib.sha256(data).hexdigest()
        offset = left.find(data)
        if offset < 0:
            if digest in constants:  # two layers share one constant
                continue
            raise PackageError("a constant is not found in its library", found=f"{value.dtype}{list(value.shape)}")
        left[offset : offset + len(data)] = bytes(len(data))
        holes.append(
            {
                "offset": offset,
                "count": len(data),
                "sha256": digest,
                "kind": "int8" if value.dtype == np.int8 else "nibbles",
            }
        )
        constants[digest] = data
    return bytes(left), holes, constants

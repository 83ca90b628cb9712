"""Small models with something odd in the middle, and what inspect and compile say of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.errors import HawqError

F = np.float32
node = helper.make_node


def graph(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, tuple[int, Sequence[int]]], outputs: Sequence[str], constants: Mapping[str, Any],
    opset: int = 19, domains: Sequence[str] = (),
) -> onnx.ModelProto:  # fmt: skip
    """A model of these parts."""
    made = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=o) for o in outputs], [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(made, opset_imports=imports, ir_version=9)


def between(
    nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any], shape: Sequence[int] = (1, 4, 4, 4), out_scale: Any = 0.05, more: Sequence[str] = ()
) -> onnx.ModelProto:
    """A uint8 tensor `d` with scale 0.05, `nodes` that make `o` of it, and its quantize; more: further outputs."""
    border = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"), node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"), *nodes,
        node("QuantizeLinear", ["o", "so", "z"], ["qo"], name="qo"), node("DequantizeLinear", ["qo", "so", "z"], ["y"], name="y"),
    ]  # fmt: skip
    return graph(border, {"x": (TensorProto.FLOAT, shape)}, ["y", *more], {"s": F(0.05), "z": np.uint8(7), "so": F(out_scale), **constants})


def weight(shape: Sequence[int] = (4, 4, 1, 1), scale: float = 0.01) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """The nodes and constants of an int8 weight `w`."""
    values = np.random.default_rng(0).integers(-127, 127, shape).astype(np.int8)
    return [node("DequantizeLinear", ["wq", "ws"], ["w"], name="dqw")], {"wq": values, "ws": F(scale)}


def refusal(model: Any, **options: Any) -> str:
    """The sentence with which inspect and compile, alike, refuse a model; empty where both take it. Nothing else is raised, nothing warned of."""
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in (lambda: ht.inspect(model, **options).error, lambda: str(ht.compile(model, **options) and "")):
            try:
                said.append(run())
            except HawqError as e:
                said.append(str(e))
    assert said[0] == said[1], said
    assert said[0].isprintable() and len(said[0]) < 2500
    return said[0]

"""Small ONNX models for the frontend's tests, and their evaluation by ONNX's reference and by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper

from hawq_tvm.core import ops, stages
from hawq_tvm.frontend.onnx import import_onnx
from hawq_tvm.verify.reference import evaluate

Array = np.ndarray[Any, Any]


@dataclass
class Fixed:
    """An operand that is an initializer; plain arrays are run-time inputs."""

    array: Any


def normal(*shape: int, seed: int = 0) -> Array:
    """Seeded float32 values of both signs."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(dtype: str, *shape: int, seed: int = 0) -> Array:
    """Seeded integers over the whole range of a type, its extremes included."""
    info = np.iinfo(dtype)
    x = np.random.default_rng(seed).integers(info.min, info.max, shape, dtype=np.int64, endpoint=True).astype(dtype)
    x.flat[: min(2, x.size)] = [info.min, info.max][: min(2, x.size)]
    return x


def tensor(name: str, array: Any) -> onnx.TensorProto:
    """A TensorProto of an array, sub-byte types packed as ONNX wants."""
    return numpy_helper.from_array(np.asarray(array), name)


def value(name: str, array: Any) -> onnx.ValueInfoProto:
    """The declaration of an input that holds arrays like this one."""
    array = np.asarray(array)
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Any],
    outputs: Sequence[str],
    constants: dict[str, Any] | None = None,
    opset: int = 17,
    ir: int = 10,
) -> onnx.ModelProto:
    """A model of nodes; inputs are declared by example arrays, outputs carry no type."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [value(n, a) for n, a in inputs.items()],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        [tensor(n, a) for n, a in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def node_model(
    op: str, operands: Sequence[Any], *, opset: int = 17, outputs: int = 1, domain: str = "", **attributes: Any
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node named "n" and what to feed it; operands: arrays, Fixed(array), or None when left out."""
    names = [f"i{k}" if o is not None else "" for k, o in enumerate(operands)]
    feed = {n: np.asarray(o) for n, o in zip(names, operands) if o is not None and not isinstance(o, Fixed)}
    constants = {n: o.array for n, o in zip(names, operands) if isinstance(o, Fixed)}
    results = [f"y{k}" for k in range(outputs)]
    node = helper.make_node(op, names, results, name="n", domain=domain, **attributes)
    return graph_model([node], feed, results, constants, opset), feed


def imported(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """The outputs of the imported module, evaluated by the project's reference in float64."""
    return evaluate(import_onnx(model), feed)


def onnx_reference(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """The outputs by onnx.reference."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    return dict(zip(evaluator.output_names, evaluator.run(None, feed)))


def onnxruntime(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """The outputs by ONNX Runtime without graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed)))


def check_float(
    op: str,
    operands: Sequence[Any],
    *,
    oracle: Any = onnx_reference,
    opset: int = 17,
    outputs: int = 1,
    domain: str = "",
    **attributes: Any,
) -> tvm.IRModule:
    """Import one float node and compare its values with an oracle's; returns the module."""
    model, feed = node_model(op, operands, opset=opset, outputs=outputs, domain=domain, **attributes)
    got, wanted = imported(model, feed), oracle(model, feed)
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        if array.dtype.kind == "f":
            # The oracle computes in float32, we in float64.
            np.testing.assert_allclose(got[name], array, rtol=2e-5, atol=2e-6)
        else:
            np.testing.assert_array_equal(got[name], array)
    return import_onnx(model)


def op_names(module: tvm.IRModule) -> list[str]:
    """The operators of main in order, without their prefix; tuples and constants left out."""
    names = [ops.op_name(b.value) for b in stages.bindings(module["main"])]
    return [n.split(".")[-1] for n in names if n]


def layer_names(module: tvm.IRModule) -> list[str]:
    """The names of main's bindings, without the final tuple."""
    return [b.var.name for b in stages.bindings(module["main"])][:-1]


def call(module: tvm.IRModule, op: str) -> Any:
    """The only call of an operator in main."""
    found = [b.value for b in stages.bindings(module["main"]) if ops.op_name(b.value).split(".")[-1] == op]
    assert len(found) == 1
    return found[0]

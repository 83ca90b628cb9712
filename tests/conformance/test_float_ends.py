"""Every operator of ONNX's node test cases as the float end of a quantized model: compiled, or cut off and joined."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hawq_tvm.core import cut
from hawq_tvm.frontend.onnx import import_before_cut
from hawq_tvm.verify.reference import evaluate

# Drawn at random, or trained: nothing to compare.
LEFT_OUT = {"RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}


@lru_cache
def cases() -> dict[str, tuple[onnx.ModelProto, dict[str, Any]]]:
    """One case for each operator whose first input is a float tensor and ONNX's own domain, its first input quantized
    and its other inputs constant.
    """
    from onnx.backend.test.case.node import collect_testcases

    found: dict[str, tuple[onnx.ModelProto, dict[str, Any]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            graph, data = case.model.graph, case.data_sets[0][0]
            ops = [n.op_type for n in graph.node]
            opsets = {o.domain: o.version for o in case.model.opset_import}
            if len(ops) == 1 and ops[0] not in {*found, *LEFT_OUT} and set(opsets) == {""} and opsets[""] >= 13:
                made = behind_a_quantize(case.model, data)
                if made is not None:
                    found[ops[0]] = made, {graph.input[0].name: data[0]}
    return found


def behind_a_quantize(case: onnx.ModelProto, data: list[Any]) -> onnx.ModelProto | None:
    """A case whose first input passes a QuantizeLinear; None where it is no float tensor, or one without elements."""
    if not data or not all(isinstance(a, np.ndarray) for a in data) or data[0].dtype != np.float32 or not data[0].size:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case)
    graph, (first, *rest) = model.graph, list(model.graph.input)
    if not first.type.HasField("tensor_type"):
        return None
    for node in graph.node:
        node.input[:] = ["x.real" if name == first.name else name for name in node.input]
    graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.05), "x.scale"), numpy_helper.from_array(np.uint8(9), "x.zero")]
    )
    graph.initializer.extend(numpy_helper.from_array(a, i.name) for a, i in zip(data[1:], rest, strict=True))
    for value in rest:
        graph.input.remove(value)
    nodes = [
        helper.make_node("QuantizeLinear", [first.name, "x.scale", "x.zero"], ["x.q"]),
        helper.make_node("DequantizeLinear", ["x.q", "x.scale", "x.zero"], ["x.real"]),
        *graph.node,
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("op", sorted(cases()))
def test_an_operator_ends_a_model_in_float(op: str) -> None:
    model, feed = cases()[op]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        wanted = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)
    except Exception:  # ONNX Runtime's errors have no base of their own
        wanted = None  # an operator that this ONNX Runtime does not know: the package can be made all the same
    module = import_before_cut(model)
    end = cut.of_main(module["main"])
    got = evaluate(module, feed)
    if wanted is None:
        return
    if end is not None:
        session = onnxruntime.InferenceSession(cut.model_of(module["main"]), options)
        types = {"tensor(float)": np.float32}
        every = {**feed, **got}
        given = {
            i.name: np.asarray(every[i.name]).astype(types.get(i.type, every[i.name].dtype))
            for i in session.get_inputs()
        }
        got.update(zip((o.name for o in session.get_outputs()), session.run(None, given), strict=True))
    for output, value in zip(model.graph.output, wanted, strict=True):
        if isinstance(value, np.ndarray) and output.type.tensor_type.elem_type != TensorProto.STRING:
            found = np.asarray(got[output.name])
            assert found.shape == value.shape
            np.testing.assert_allclose(found.astype(float), value.astype(float), rtol=1e-3, atol=1e-4)  # float32's sums


def test_most_operators_are_there() -> None:
    assert len(cases()) > 100

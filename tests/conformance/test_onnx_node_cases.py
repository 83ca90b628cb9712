"""The integer-only ONNX backend node cases of the onnx package, through the whole compile path, exactly.

The cases feed scales and zero points as run-time inputs; a compiler needs them as constants, so those inputs are
turned into initializers with the case's own values. Data and weights stay run-time inputs.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import hawq_tvm as ht

QUANTIZED_OPS = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulInteger",
    "ConvInteger",
}


def _element_types(model: onnx.ModelProto) -> set[str]:
    values = [*model.graph.input, *model.graph.output]
    return {onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values}


def _cases() -> list[Any]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own case generators divide by zero on purpose
        cases = load_model_tests(kind="node")
    quantized = [c for c in cases if QUANTIZED_OPS & {n.op_type for n in c.model.graph.node}]
    return [c for c in quantized if not any("FLOAT8" in t or "FLOAT4" in t for t in _element_types(c.model))]


CASES = _cases()


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _constants_bound(case: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    names = [i.name for i in model.graph.input]
    arrays = dict(zip(names, case.data_sets[0][0], strict=True))
    for value in list(model.graph.input):
        if "scale" in value.name or "zero_point" in value.name:
            array = _array(arrays.pop(value.name))
            tensor = onnx.helper.make_tensor(
                value.name,
                value.type.tensor_type.elem_type,
                [d.dim_value for d in value.type.tensor_type.shape.dim],
                array.astype(np.float32).ravel() if array.dtype.kind not in "iu" else array.ravel(),
            )
            model.graph.initializer.append(tensor)
            model.graph.input.remove(value)
    return model, {k: _array(v) for k, v in arrays.items()}


def test_the_package_has_the_cases_we_think_it_has() -> None:
    assert len(CASES) == 37


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_node_case(case: Any) -> None:
    model, feed = _constants_bound(case)
    # The three expanded cases spell DynamicQuantizeLinear as a float graph: nothing in them is integer.
    package = ht.compile(model, allow_float_tail="expanded" in case.name)
    outputs = package.run(feed)
    expected = [_array(v) for v in case.data_sets[0][1]]
    for name, wanted in zip([o.name for o in case.model.graph.output], expected, strict=True):
        got = outputs[name]
        assert got.shape == wanted.shape
        if wanted.dtype.itemsize != 1 or wanted.dtype.kind in "iuf":
            assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted.astype(got.dtype))  # sub-byte values come back in 8 bits
    if "expanded" not in case.name:
        package.verify(random=2, seed=0).raise_if_mismatch()

"""Every node case of the onnx package that the frontend imports gives the outputs the package says."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import evaluate

# The reference evaluates float graphs in float64, and this case depends on a float32 rounding before a float32 tie.
FLOAT32_TIE = {"test_dynamicquantizelinear_expanded"}


def bound(case: Any, runtime: set[int]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The case's model with all inputs but the `runtime` ones made initializers, and what to feed it."""
    model, feed = onnx.ModelProto(), {}
    model.CopyFrom(case.model)
    for i, (info, data) in enumerate(zip(list(model.graph.input), case.data_sets[0][0])):
        array = np.asarray(numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else data)
        if i in runtime:
            feed[info.name] = array
            continue
        model.graph.input.remove(info)
        if array.dtype.kind in "iub":
            model.graph.initializer.append(numpy_helper.from_array(array, info.name))
        else:
            kind = info.type.tensor_type.elem_type
            model.graph.initializer.append(
                helper.make_tensor(info.name, kind, array.shape, array.astype(np.float32).ravel())
            )
    return model, feed


def outcome(case: Any) -> str:
    """ "same", "refused" or "different"; tried with all inputs at run time, then with all but the first constant."""
    count = len(case.model.graph.input)
    tensors = all(isinstance(a, np.ndarray | np.generic | onnx.TensorProto) for a in case.data_sets[0][0])
    if not tensors or any(a.dtype.kind == "O" for a in case.data_sets[0][0] if isinstance(a, np.ndarray)):
        return "refused"
    for runtime in [set(range(count)), {0}]:
        model, feed = bound(case, runtime)
        try:
            module = import_onnx(model)
        except ModelError:
            continue
        stored = {p.name: str(p.ty.dtype) for p in module["main"].params}
        got = evaluate(module, {k: v.astype(stored[k]) for k, v in feed.items()})
        for info, data in zip(case.model.graph.output, case.data_sets[0][1]):
            wanted = np.asarray(numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else data)
            values = got[info.name]
            wide = np.float64 if wanted.dtype.kind == "f" else np.int64
            # Expected floats are float32 results, some printed with four digits only; or every step rounded to float16.
            half = wanted.dtype == np.float16
            relative, absolute = (1e-3, 5e-4) if half else (4e-4 if wide is np.float64 else 0, 1e-5)
            close = np.allclose(values.astype(wide), wanted.astype(wide), relative, absolute, equal_nan=True)
            if values.shape != wanted.shape or not close:
                return "different"
        return "same"
    return "refused"


@pytest.mark.slow
def test_all_node_cases() -> None:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own case generators divide by zero on purpose
        cases = load_model_tests(kind="node")
        outcomes = {c.name: outcome(c) for c in cases if c.name not in FLOAT32_TIE}
    counts = Counter(outcomes.values())
    assert [n for n, o in outcomes.items() if o == "different"] == []
    assert counts["same"] >= 700

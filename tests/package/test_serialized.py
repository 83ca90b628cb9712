"""A module's JSON with its constants apart, against what TVM writes of it whole."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.serialized import TYPES, Tensor, serialized

from ..models import residual_net


def module_of(*arrays: tvm.runtime.Tensor, twice: bool = False) -> tvm.IRModule:
    """A module whose result is these constants; twice: each in two constants of one tensor, one of them read twice."""
    builder = relax.BlockBuilder()
    with builder.function("main", []):
        constants = []
        for array in arrays:
            kind = relax.TensorType(tuple(int(d) for d in array.shape), str(array.dtype))
            one, other = (tvm.ir.GenericConst(array, kind) for _ in range(2))
            constants += [one, other, one] if twice else [one]
        builder.emit_func_output(builder.emit(relax.Tuple(constants)))
    return builder.get()


def check(module: tvm.IRModule, large: int) -> None:
    found = serialized(module)
    assert b"".join(found.whole()) == tvm.ir.save_json(module).encode() and len(found.tensors) == large


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("shape", [(), (0,), (1, 8), (3, 1, 7), (5000,)])
def test_tensors_are_spelled_as_tvm_does(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    tensor = tvm.runtime.tensor(array)
    (node,) = (n for n in json.loads(tvm.ir.save_json(tensor))["nodes"] if n["type"] == "ffi.Tensor")
    own = Tensor.of(array)
    assert base64.b64encode(own.header + own.data.tobytes()).decode() == node["data"]
    check(module_of(tensor), int(array.nbytes > 64))


def test_every_letter_and_what_numpy_has_no_type_for() -> None:
    letters = tvm.runtime.tensor(np.arange(2**16, dtype=np.uint16))  # slashes are escaped in JSON
    narrow = tvm.runtime.empty((300,), "bfloat16")  # of int4, TVM writes twice the bytes that there are
    check(module_of(letters, narrow), 1)


def test_shared_tensors_and_constants_stay_shared() -> None:
    arrays = [tvm.runtime.tensor(np.full(100, n, np.int8)) for n in (1, 2, 1)]
    check(module_of(*arrays, twice=True), 3)


def test_networks() -> None:
    annotated = pipeline.import_annotated(residual_net())
    check(annotated, 3)
    packed = pipeline.to_packed(annotated)
    assert b"".join(serialized(packed).whole()) == tvm.ir.save_json(packed).encode()

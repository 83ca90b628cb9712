"""com.microsoft.MatMulNBits between quantized activations; ONNX Runtime's own run is compared by the fixture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.ops import op_name
from hawq_tvm.core.stages import bindings
from hawq_tvm.frontend.onnx import import_onnx

from ..models import Graph

F, MICROSOFT = np.float32, "com.microsoft"


def product(depth: int, bits: int, block: int, zeros: bool = False, bias: bool = False, **change: Any) -> Any:
    g, columns = Graph(4), 5
    blocks = -(-depth // block)
    packed = g.constant(g.rng.integers(0, 256, (columns, blocks, block * bits // 8)), TensorProto.UINT8)
    scale = g.constant((g.rng.uniform(0.3, 1, (columns, blocks)) * 0.1 / 2**bits).astype(F), TensorProto.FLOAT)
    size = columns * -(-blocks * bits // 8)
    inputs = [g.qdq(g.input("x", [3, depth]), F(0.02), 120), packed, scale]
    inputs += [g.constant(g.rng.integers(0, 256, size), TensorProto.UINT8) if zeros else ""]
    inputs += ["", g.constant(g.rng.normal(size=columns).astype(F), TensorProto.FLOAT)] if bias else []
    attributes = {"K": depth, "N": columns, "bits": bits, "block_size": block, **change}
    y = g.node("MatMulNBits", inputs if zeros or bias else inputs[:3], MICROSOFT, **attributes)
    return g.model([(g.qdq(y, F(0.02), 100), TensorProto.FLOAT)])


@pytest.mark.parametrize("depth", [32, 96, 256])
@pytest.mark.parametrize("bits, zeros, bias", [(4, False, False), (4, True, True), (8, True, False)])
def test_it_is_a_product_of_integers(depth: int, bits: int, zeros: bool, bias: bool) -> None:
    packed = pipeline.to_packed(import_onnx(product(depth, bits, 32, zeros, bias)))
    calls = [op_name(b.value) for f in packed.functions.values() for b in bindings(f)]
    assert 1 <= calls.count("relax.matmul") <= 5


@pytest.mark.parametrize(
    "change, words",
    [({"bits": 5}, "bit width"), ({"K": 0}, "lacks its sizes"), ({"N": 6}, "weight that does not fit")],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        import_onnx(product(64, change.pop("bits", 4), 32, **change))

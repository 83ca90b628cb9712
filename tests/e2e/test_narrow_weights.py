"""Weights of few bits from files to packages: the values decide how they are stored, whatever type a file declares."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.bench.packaged import weights
from hawq_tvm.compiler.inspection import inspect

KINDS: dict[str, Any] = {"int2": ml_dtypes.int2, "uint2": ml_dtypes.uint2, "int4": ml_dtypes.int4, "int8": np.int8}
INPUTS, OUTPUTS = 19, 21


def network(declared: list[onnx.NodeProto], constants: dict[str, np.ndarray], domains: tuple[str, ...] = ()) -> Any:
    """A convolution between uint8 tensors; declared: nodes that give its weights "wd" from constants."""
    constants |= {"xs": np.float32(0.1), "xz": np.uint8(3), "ys": np.float32(0.2), "yz": np.uint8(100)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        *declared,
        helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"]),
    ]
    inits = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    shapes = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 7, 9]) for n, c in (("x", INPUTS), ("y", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "narrow", shapes[:1], shapes[1:], inits)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 25), *(helper.make_opsetid(d, 1) for d in domains)]
    )


def stored(model: onnx.ModelProto) -> str:
    """The widths of a package's weights, after its library was compared with the reference on every layer."""
    package = ht.compile(model, target="host")
    package.verify(random=2, seed=0).raise_if_mismatch()
    assert package.prove().ok
    return weights(package.graph)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_two_bits_in_every_type(kind: str) -> None:
    rng, low = np.random.default_rng(1), 0 if kind[0] == "u" else -2
    w = rng.integers(low, low + 4, (OUTPUTS, INPUTS, 3, 3)).astype(KINDS[kind])
    zero = np.full(OUTPUTS, low + 2).astype(KINDS[kind])
    dequantize = helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0)
    model = network([dequantize], {"w": w, "ws": rng.uniform(0.01, 0.02, OUTPUTS).astype(np.float32), "wz": zero})
    assert stored(model) == "1 layers of 2-bit weights"


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 3), (4, 4), (5, 6), (6, 6), (7, 8), (8, 8)])
def test_qonnx_weights_of_any_width(bits: int, width: int) -> None:
    rng = np.random.default_rng(bits)
    w = rng.normal(0, 0.5, (OUTPUTS, INPUTS, 3, 3)).astype(np.float32)
    scale = (np.abs(w).max((1, 2, 3), keepdims=True) / (2 ** (bits - 1) - 0.6)).astype(np.float32)
    quant = helper.make_node(
        "Quant",
        ["w", "ws", "zero", "bits"],
        ["wd"],
        domain="qonnx.custom_op.general",
        signed=1,
        narrow=0,
        rounding_mode="ROUND",
    )
    model = network([quant], {"w": w, "ws": scale, "zero": np.float32(0), "bits": np.float32(bits)}, (quant.domain,))
    assert inspect(model).compilable
    assert stored(model) == f"1 layers of {f'{width}-bit' if width < 8 else 'int8'} weights"


def test_four_bits_with_a_zero_point_by_channel() -> None:
    """Integers less their zero points have up to 5 bits, which are stored in 6."""
    rng = np.random.default_rng(6)
    w = rng.integers(-8, 8, (OUTPUTS, INPUTS, 3, 3)).astype(ml_dtypes.int4)
    zero = rng.integers(-8, 8, OUTPUTS).astype(ml_dtypes.int4)
    dequantize = helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0)
    model = network([dequantize], {"w": w, "ws": rng.uniform(0.01, 0.02, OUTPUTS).astype(np.float32), "wz": zero})
    assert stored(model) == "1 layers of 6-bit weights"


@pytest.mark.parametrize(("most", "width"), [(1, "6-bit"), (2, "6-bit"), (3, "int8")])
def test_groups_of_four_bits_whose_scales_are_powers_of_two_apart(most: int, width: str) -> None:
    """Shifted into one scale, which is exact: the output is that of one scale by channel and wider integers."""
    rng, block = np.random.default_rng(most), 4
    w = rng.integers(-8, 8, (OUTPUTS, INPUTS, 3, 3))
    own = rng.uniform(0.01, 0.02, OUTPUTS).astype(np.float32)
    shifts = rng.integers(0, most + 1, (OUTPUTS, -(-INPUTS // block), 3, 3))
    shifts[0, :2, 0, 0] = 0, most
    scale = np.ldexp(own.reshape(-1, 1, 1, 1), shifts).astype(np.float32)
    blocked = helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1, block_size=block)
    grouped = network([blocked], {"w": w.astype(ml_dtypes.int4), "ws": scale})
    assert stored(grouped) == f"1 layers of {width} weights"
    wide = np.left_shift(w, np.repeat(shifts, block, 1)[:, :INPUTS]).astype(np.int8)
    plain = helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0)
    other = network([plain], {"w": wide, "ws": own})
    x = {"x": rng.normal(0, 5, (1, INPUTS, 7, 9)).astype(np.float32)}
    np.testing.assert_array_equal(ht.compile(grouped).run(x)["y"], ht.compile(other).run(x)["y"])

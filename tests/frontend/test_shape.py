"""Operators that only move elements: the same values as ONNX on floats and on 8-bit integers, variants by opset
included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import (
    Fixed,
    check_float,
    imported,
    integers,
    node_model,
    normal,
    onnx_reference,
    onnxruntime,
    op_names,
)

X = normal(2, 3, 4, 6)


def check(
    op: str, operands: list[Any], *, opset: int = 17, outputs: int = 1, oracle: Any = onnx_reference, **attributes: Any
) -> None:
    """Compare on float32, and exactly on the first operand's shape in uint8."""
    check_float(op, operands, opset=opset, outputs=outputs, oracle=oracle, **attributes)
    data = integers("uint8", *np.shape(operands[0]))
    if op in ("Pad",) and len(operands) > 2 and operands[2] is not None:
        operands = [operands[0], operands[1], Fixed(np.uint8(7)), *operands[3:]]
    model, feed = node_model(op, [data, *operands[1:]], opset=opset, outputs=outputs, **attributes)
    got, wanted = imported(model, feed), oracle(model, feed)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


def ints(*values: int) -> Fixed:
    return Fixed(np.asarray(values, np.int64))


@pytest.mark.parametrize(
    "shape, attributes",
    [
        ((2, 12, 6), {}),
        ((0, -1), {}),
        ((-1,), {}),
        ((0, 0, 24), {}),
        ((2, 3, 4, 6), {}),
        ((6, 4, 6, 1), {"allowzero": 1}),
    ],
)
def test_reshape(shape: tuple[int, ...], attributes: dict[str, int]) -> None:
    check("Reshape", [X, ints(*shape)], **attributes)


@pytest.mark.parametrize("axis", [0, 1, 2, 4, -1])
def test_flatten(axis: int) -> None:
    check("Flatten", [X], axis=axis)


@pytest.mark.parametrize("perm", [None, [0, 2, 3, 1], [3, 2, 1, 0], [0, 1, 2, 3]])
def test_transpose(perm: list[int] | None) -> None:
    check("Transpose", [X], **({} if perm is None else {"perm": perm}))


def test_squeeze_and_unsqueeze_by_opset() -> None:
    thin = normal(1, 3, 1, 4)
    check("Squeeze", [thin, ints(0, -2)])
    check("Squeeze", [thin])
    check("Squeeze", [thin], opset=11, axes=[2], oracle=onnxruntime)
    check("Squeeze", [thin], opset=11, oracle=onnxruntime)
    check("Unsqueeze", [thin, ints(-1, 1)])
    check("Unsqueeze", [thin], opset=11, axes=[0, 3], oracle=onnxruntime)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis: int) -> None:
    check_float("Concat", [X, Fixed(X + 1), X - 1], axis=axis)
    model, feed = node_model("Concat", [integers("int8", 2, 3), Fixed(integers("int8", 2, 3, seed=1))], axis=axis)
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnx_reference(model, feed)["y0"])


def test_split_by_opset() -> None:
    check("Split", [X, ints(1, 5)], outputs=2, axis=3)
    check("Split", [X], outputs=3, axis=-1)
    check("Split", [X], outputs=2, opset=11, axis=3, split=[2, 4], oracle=onnxruntime)
    check("Split", [X], outputs=2, opset=11, axis=2, oracle=onnxruntime)
    check("Split", [X], outputs=2, opset=18, axis=1, num_outputs=2, oracle=onnxruntime)


@pytest.mark.parametrize(
    "starts, ends, axes, steps",
    [
        ((1,), (3,), (2,), None),
        ((0, 1), (9, -1), (1, 3), None),
        ((-1,), (-9,), (3,), (-1,)),
        ((5, 1), (0, 4), (3, 2), (-2, 2)),
        ((1, 0), (2, 3), None, None),
        ((-100,), (100,), (-1,), None),
        ((3,), (-100,), (2,), (-3,)),
        ((0,), (2**63 - 1,), (0,), None),
        ((2**62,), (-(2**62),), (1,), (-2,)),
    ],
)
def test_slice(starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    check(
        "Slice",
        [X, ints(*starts), ints(*ends), None if axes is None else ints(*axes), None if steps is None else ints(*steps)],
    )


@pytest.mark.parametrize("indices", [np.int64(1), np.int64(-1), np.array([2, 0, -1]), np.array([[1, 0], [0, 1]])])
@pytest.mark.parametrize("axis", [1, 3])
def test_gather_of_constant_indices(indices: Any, axis: int) -> None:
    check("Gather", [X, Fixed(indices)], axis=axis)


def test_expand_and_tile() -> None:
    check("Expand", [normal(3, 1), ints(2, 1, 4)])
    check("Expand", [X, ints(1)])
    check("Tile", [X, ints(1, 2, 1, 3)])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("pads", [(0, 0, 1, 2, 0, 0, 3, 0), (1, 0, 0, 0, 0, 2, 0, 0), (0, 0, 0, 0, 0, 0, 0, 0)])
def test_pad(mode: str, pads: tuple[int, ...]) -> None:
    if mode == "reflect" and pads[0]:
        pads = (0, 1, *pads[2:])
    check("Pad", [X, ints(*pads), Fixed(np.float32(1.5))], mode=mode, oracle=onnxruntime)
    check("Pad", [X, ints(*pads)], mode=mode, oracle=onnxruntime)


def test_pad_by_opset() -> None:
    check_float("Pad", [X], opset=10, pads=[0, 0, 1, 2, 0, 0, 3, 0], value=2.5, oracle=onnxruntime)
    check("Pad", [X, ints(1, -1, 2, 0), None, ints(-1, 1)], opset=18, oracle=onnxruntime)
    check("Pad", [X, ints(0, 0, -1, 2, 0, 0, 3, -2)], oracle=onnxruntime)
    check("Pad", [X, ints(0, 0, 3, 2, 0, 0, 4, 6)], opset=19, mode="wrap")
    check("Pad", [X, ints(0, 0, -1, 0, 0, -1, 0, -2)], oracle=onnxruntime)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    check("DepthToSpace", [normal(2, 12, 3, 2)], blocksize=2, mode=mode)
    check("SpaceToDepth", [X], blocksize=2)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_sub_byte_tensors_move_in_eight_bits(dtype: str) -> None:
    import ml_dtypes

    model, _ = node_model("Transpose", [np.zeros((2, 3), getattr(ml_dtypes, dtype))], opset=25)
    module = import_onnx(model)
    assert (
        [str(t) for t in module["main"].attrs["hawq.output_types"]]
        == [dtype]
        == [str(t) for t in module["main"].attrs["hawq.input_types"]]
    )
    storage = "uint8" if dtype.startswith("u") else "int8"
    x = np.arange(6, dtype=storage).reshape(2, 3)
    np.testing.assert_array_equal(imported(model, {"i0": x})["y0"], x.T)


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("Reshape", [X, ints(5)], {}, "144 elements"),
        ("Reshape", [X, ints(-1, 7)], {}, "144 elements"),
        ("Reshape", [X, ints(0, 0, 0, 0, 0)], {}, "does not have"),
        ("Reshape", [X, ints(-1, -1)], {}, "does not fit"),
        ("Transpose", [X], {"perm": [0, 1, 1, 2]}, "permutation"),
        ("Squeeze", [X, ints(1)], {}, "not 1"),
        ("Unsqueeze", [X, ints(7)], {}, "out of range"),
        ("Unsqueeze", [X, ints(0, 0)], {}, "twice"),
        ("Split", [X, ints(1, 7)], {"axis": 3}, "add up"),
        ("Slice", [X, ints(2), ints(1)], {}, "no element"),
        ("Slice", [X, ints(1), ints(2), ints(0, 1)], {}, "do not fit"),
        ("Slice", [X, ints(1), ints(2), ints(0), ints(0)], {}, "other than 0"),
        ("Gather", [X, ints(9)], {"axis": 1}, "index out of range"),
        ("Expand", [X, ints(5)], {}, "broadcast"),
        ("Tile", [X, ints(2)], {}, "repeats"),
        ("Pad", [X, ints(1, 1)], {}, "8 integers"),
        ("Pad", [X, ints(0, 0, -4, 0, 0, 0, 0, 0)], {}, "everything"),
        ("Pad", [X, ints(0, 0, 5, 0, 0, 0, 0, 0)], {"mode": "reflect"}, "larger"),
        ("Pad", [X, ints(0, 0, 1, 0, 0, 0, 0, 0), Fixed(np.float32(-np.inf))], {}, "not finite"),
        ("Pad", [X, ints(0, 0, 1, 0, 0, 0, 0, 0)], {"mode": "mirror"}, "unknown mode"),
        ("Concat", [X, normal(2, 3, 4, 5)], {"axis": 1}, "operands that do not fit"),
        ("Reshape", [X, np.zeros(2, np.int64)], {}, "graph input"),
        ("Expand", [X, ints(10**6, 1, 1, 10**6, 10**6)], {}, "broadcast"),
        ("Tile", [X, ints(10**5, 10**5, 1, 1)], {}, "impossible shape"),
        ("Pad", [X, ints(0, 0, 10**9, 0, 0, 0, 0, 0)], {}, "impossible shape"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, outputs=2 if op == "Split" else 1, **attributes)[0])
    assert error.value.where.startswith("n")
    assert not op_names(import_onnx(node_model("Identity", [X])[0]))

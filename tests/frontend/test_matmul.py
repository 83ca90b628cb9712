"""MatMul and Gemm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import Fixed, check_float, integers, node_model, normal, op_names


@pytest.mark.parametrize(
    "a, b",
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((2, 3, 4), (2, 4, 5)),
    ],
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_float("MatMul", [normal(*a), Fixed(normal(*b, seed=1))])
    check_float("MatMul", [normal(*a), normal(*b, seed=1)])


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", [None, (), (5,), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.3, 0.7)])
def test_gemm(trans_a: int, trans_b: int, c: tuple[int, ...] | None, alpha: float, beta: float) -> None:
    a, b = normal(*((4, 3) if trans_a else (3, 4))), normal(*((5, 4) if trans_b else (4, 5)), seed=1)
    bias = [] if c is None else [np.asarray(normal(*c, seed=2), np.float32)]
    attributes = {"transA": trans_a, "transB": trans_b, "alpha": alpha, "beta": beta}
    check_float("Gemm", [a, Fixed(b), *map(Fixed, bias)], **attributes)
    check_float("Gemm", [a, b, *bias], **attributes)


def test_plain_gemm_is_a_product_and_a_sum() -> None:
    assert op_names(
        import_onnx(node_model("Gemm", [normal(2, 4), Fixed(normal(5, 4)), Fixed(normal(5))], transB=1)[0])
    ) == ["matmul", "add"]


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("MatMul", [normal(3, 4), normal(5, 4)], {}, "cannot be multiplied"),
        ("MatMul", [integers("int32", 3, 4), integers("int32", 4, 3)], {}, "MatMulInteger"),
        ("MatMul", [normal(2, 3, 4), normal(3, 4, 5)], {}, "does not fit"),
        ("Gemm", [normal(3, 4), normal(5, 4)], {}, "cannot be multiplied"),
        ("Gemm", [normal(3, 4), normal(4, 5), normal(7)], {}, "bias"),
        ("Gemm", [normal(2, 3, 4), normal(4, 5)], {}, "matrices"),
        ("Gemm", [normal(3, 4), normal(4, 5), normal(2, 3, 5)], {}, "bias"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, **attributes)[0])
    assert error.value.where == "n"

"""Attention and Einsum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import Fixed, check_float, node_model, normal, onnx_reference, onnxruntime, op_names

F = np.float32


def heads(count: int, others: int, flat: bool) -> list[Any]:
    """Q, K and V of two batches, 5 words and 7, depths 8 and 6."""
    if flat:
        return [normal(2, 5, count * 8), normal(2, 7, others * 8, seed=1), normal(2, 7, others * 6, seed=2)]
    return [normal(2, count, 5, 8), normal(2, others, 7, 8, seed=1), normal(2, others, 7, 6, seed=2)]


def numbers(count: int, others: int, flat: bool) -> dict[str, int]:
    return {"q_num_heads": count, "kv_num_heads": others} if flat else {}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("count, others", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("causal", [0, 1])
def test_heads(flat: bool, count: int, others: int, causal: int) -> None:
    options = {"is_causal": causal, "opset": 23, **numbers(count, others, flat)}
    check_float("Attention", heads(count, others, flat), **options)
    check_float("Attention", heads(count, others, flat), oracle=onnxruntime, **options)


FULL, ONE_ROW = [(5, 7), (2, 1, 5, 7), (2, 4, 5, 7)], [(1, 7), (4, 1, 7), (2, 1, 1, 7)]


# ONNX Runtime takes no mask of one row, of which ONNX's reference makes a causal one of one row.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("shape, causal", [*((s, c) for s in FULL for c in (0, 1)), *((s, 0) for s in ONE_ROW)])
@pytest.mark.parametrize("kind", ["bool", "float32", "infinite"])
@pytest.mark.parametrize("fixed", [False, True])
def test_masks(shape: tuple[int, ...], kind: str, fixed: bool, causal: int) -> None:
    mask = np.random.default_rng(3).random(shape) < 0.6
    if kind == "infinite" and not fixed:
        mask[..., 0] = True
    else:
        mask[..., -1, :] = False  # of a row that is masked everywhere nothing is left
    values = mask if kind == "bool" else np.where(mask, 0.3, -np.inf if kind == "infinite" else -2).astype(F)
    operands = [*heads(4, 2, False), Fixed(values) if fixed else values]
    oracle = onnx_reference if shape[-2] == 1 else onnxruntime
    check_float("Attention", operands, opset=23, is_causal=causal, scale=0.21, oracle=oracle)


@pytest.mark.parametrize(
    "operands, attributes, words",
    [
        ([*heads(2, 2, False)], {"softcap": 30.0}, "caps its scores"),
        ([*heads(2, 2, False), None, normal(2, 2, 3, 8), normal(2, 2, 3, 6)], {}, "past_key"),
        ([*heads(2, 2, True)], {}, "q_num_heads that does not fit"),
        ([*heads(2, 2, True)], {"q_num_heads": 2, "kv_num_heads": 5}, "kv_num_heads that does not fit"),
        ([*heads(3, 2, False)], {}, "do not fit"),
        ([*heads(2, 2, False)[:2], normal(2, 2, 6, 6)], {}, "do not fit"),
        ([*heads(2, 2, False), normal(5, 6)], {}, "mask that does not fit"),
        ([*heads(2, 2, False), np.ones((5, 7), np.int64)], {}, "mask of integers"),
        ([*heads(2, 2, False)[:2], normal(2, 7, 12)], {}, "other ranks"),
    ],
)
def test_refused_attention(operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model("Attention", operands, opset=23, **attributes)[0])
    assert error.value.where == "n"


def test_present_keys_are_refused() -> None:
    with pytest.raises(ModelError, match="gives more than its result"):
        import_onnx(node_model("Attention", heads(2, 2, False), opset=23, outputs=3)[0])


SIZES = {"b": 2, "h": 3, "q": 4, "k": 5, "d": 6, "e": 7, "o": 8}


@pytest.mark.parametrize(
    "equation",
    [
        "bhqd,bhkd->bhqk",
        "bhqk,bhkd->bqhd",
        "bqhd,bkhd->bhqk",
        "bqd,hde->bqhe",
        "hde,bqd->bqhe",
        "bqhd,hdo->bqo",
        "qd,dk",
        "qd,kd->kq",
        "qd,d->q",
        "d,d->",
        "d,dk->k",
        "bq,bk->bqk",
        "bhq,bh->bhq",
        "bh,qb->qbh",
        "bqd,bq->bd",
        "bqd,hk->bh",
        "bqd->dbq",
        "bqd->bd",
        "bqd->",
        "b h q d , b h k d -> b h q k",
        "...qd,...dk->...qk",
        "...qd,dk->q...k",
        "...d,...d",
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_einsum(equation: str, fixed: bool) -> None:
    terms = equation.replace(" ", "").partition("->")[0].replace("...", "bh").split(",")
    arrays = [normal(*(SIZES[c] for c in term), seed=i) for i, term in enumerate(terms)]
    operands = [arrays[0], *(Fixed(a) if fixed else a for a in arrays[1:])]
    if "...qd,dk" in equation:
        operands[1] = Fixed(normal(6, 5)) if fixed else normal(6, 5)
    check_float("Einsum", operands, equation=equation)
    check_float("Einsum", operands, equation=equation, oracle=onnxruntime)


def test_einsum_of_attention_is_one_product() -> None:
    model, _ = node_model("Einsum", [normal(2, 3, 4, 6), normal(2, 3, 5, 6)], equation="bhqd,bhkd->bhqk")
    assert op_names(import_onnx(model)) == ["permute_dims", "matmul"]
    model, _ = node_model("Einsum", [normal(2, 4, 6), Fixed(normal(6, 5))], equation="bqd,dk->bqk")
    assert op_names(import_onnx(model)) == ["matmul"]


@pytest.mark.parametrize(
    "equation, shapes, words",
    [
        ("qd,de,ek->qk", [(2, 3), (3, 4), (4, 5)], "multiplies several tensors"),
        ("qq->q", [(3, 3)], "not supported"),
        ("qd,dk->qx", [(2, 3), (3, 4)], "not supported"),
        ("qd,dk->qqk", [(2, 3), (3, 4)], "not supported"),
        ("qd,dk->qk", [(2, 3), (3, 4, 5)], "not supported"),
        ("qd,dk->qk", [(2, 3), (4, 5)], "gives a letter several sizes"),
        ("qd->q", [(2, 3), (4, 5)], "an equation of other operands"),
    ],
)
def test_refused_einsum(equation: str, shapes: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model("Einsum", [normal(*s) for s in shapes], equation=equation)[0])
    assert error.value.where == "n"

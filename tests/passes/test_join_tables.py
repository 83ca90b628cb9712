"""join_tables: a chain on one 8-bit tensor is one table with the same integers, and only where nothing is hidden or
lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import hawq_tvm as ht
from hawq_tvm.core.arith import QType
from relay_passes.fold_constants import fold_constants
from relay_passes.join_tables import join_tables
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.remove_dead_code import remove_dead_code

from ..frontend.onnx_models import normal, onnxruntime
from ..models import Graph, float_output
from .modules import S8, dq, module, op_names, q, same_values

INPUT: dict[str, Any] = {"x": ((3, 6), "int8")}


def integers(build: Any, inputs: dict[str, Any] = INPUT) -> tvm.IRModule:
    mod = module(build, inputs)
    for step in (lower_to_integer, fold_constants, remove_dead_code):
        mod, _ = step(mod)
    return mod


def joined(before: tvm.IRModule) -> tuple[list[str], int]:
    after, count = join_tables(before)
    after, _ = remove_dead_code(after)
    same_values(before, after)
    return op_names(after), count


def gate(bb: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    """x tanh(x / 2), every result quantized."""
    half = dq(bb, q(bb, bb.emit(relax.op.multiply(x, relax.const(0.5))), 0.011, 4, S8), 0.011, 4, S8)
    tanh = dq(bb, q(bb, bb.emit(relax.op.tanh(half)), 0.0078, 0, S8), 0.0078, 0, S8)
    return q(bb, bb.emit(relax.op.multiply(x, tanh)), 0.013, -3, S8)


def test_a_chain_with_a_table_is_one_table() -> None:
    before = integers(lambda bb, p: gate(bb, dq(bb, p[0], 0.0213, 3, S8)))
    assert len(op_names(before)) > 5
    assert joined(before) == (["lookup", ""], 1)


def test_what_is_read_elsewhere_stays() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        table = q(bb, bb.emit(relax.op.tanh(dq(bb, p[0], 0.0213, 3, S8))), 0.0078, 0, S8)
        return [table, q(bb, dq(bb, table, 0.0078, 0, S8), 0.0091, 2, S8)]

    names, count = joined(integers(build))
    assert count == 0 and "requantize" in names


@pytest.mark.parametrize("kind", ["uint16", "two"])
def test_wide_tensors_and_two_tensors_are_left(kind: str) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        qtype = QType.of("uint16") if kind == "uint16" else S8
        table = dq(bb, q(bb, bb.emit(relax.op.tanh(dq(bb, p[0], 0.0213, 3, qtype))), 0.0078, 0, S8), 0.0078, 0, S8)
        return q(bb, bb.emit(relax.op.add(table, dq(bb, p[-1], 0.0213, 3, qtype))), 0.0091, 2, S8)

    inputs = {"x": ((3, 6), "uint16")} if kind == "uint16" else {"x": ((3, 6), "int8"), "y": ((3, 6), "int8")}
    assert joined(integers(build, inputs))[1] == 0


def test_arithmetic_without_a_table_is_left_to_vectors() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, dq(bb, q(bb, dq(bb, p[0], 0.0213, 3, S8), 0.031, 1, S8), 0.031, 1, S8), 0.0471, 2, S8)

    assert joined(integers(build))[1] == 0


def test_tanh_gelu_with_every_operator_quantized_compiles() -> None:
    """As PyTorch exports it and ONNX Runtime's quantize_static annotates it."""
    g = Graph(3)
    x = g.qdq(
        g.node("MatMul", [g.qdq(g.input("x", [1, 8, 32]), 0.03, 3, "int8"), g.weight([32, 32], axis=None)]),
        0.025,
        2,
        "int8",
    )

    def constant(value: float) -> str:
        return g.dq(g.constant(127, 3), np.float32(value / 127), 0, "int8")

    def step(op: str, a: str, b: str, scale: float, zero: int = 0) -> str:
        return g.qdq(g.node(op, [a, b]), scale, zero, "int8")

    cubed = step("Mul", step("Mul", x, x, 0.08, -128), x, 0.26, 1)
    inner = step("Add", x, step("Mul", cubed, constant(0.044715), 0.0115, 1), 0.035, 1)
    tanh = g.qdq(g.node("Tanh", [step("Mul", inner, constant(0.79788), 0.028, 1)]), 0.0078, 0, "int8")
    y = step("Mul", x, step("Add", tanh, constant(1.0), 0.0157, -128), 0.05, -100)
    y = step("Mul", y, constant(0.5), 0.025, -100)
    y = g.qdq(g.node("MatMul", [y, g.weight([32, 32], axis=None)]), 0.04, 0, "int8")
    model = g.model([float_output(y)])
    package = ht.compile(model)
    assert package.verify(random=2, seed=0).ok
    feed = {"x": normal(1, 8, 32)}
    assert np.abs(package.run(feed)[y] - onnxruntime(model, feed)[y]).max() <= 0.0401

"""No package is made whose outputs contradict ONNX's inference, PyTorch's, the model's own declarations, or the model before a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper
from tvm import relax

import hawq_tvm as ht
from hawq_tvm import contract, ops, pipeline, stages
from hawq_tvm.contract import Promise
from hawq_tvm.errors import ModelError
from hawq_tvm.frontend.onnx import infer
from hawq_tvm.frontend.onnx import node as onnx_node
from relay_passes.integer import handlers
from relay_passes.rewriter import rewrite_main

from ..models import Graph, float_output


def network(outputs: Any = None) -> onnx.ModelProto:
    """A convolution of one output channel over a line, ReLU, one float output called "relu_N"."""
    g = Graph(1)
    y = g.node("Relu", [g.conv(g.qdq(g.input("x", [2, 3, 7]), 0.05, 100), g.weight([1, 3, 3]))])
    return g.model([float_output(g.qdq(y, 0.1))])


def refused(model: Any, words: str, **options: Any) -> ModelError:
    """`compile` and `inspect` refuse a model in the same words."""
    with pytest.raises(ModelError, match=words) as error:
        ht.compile(model, **options)
    report = ht.inspect(model)
    assert not report.compilable
    told = report.error + " ".join(p["reason"] + p["expected"] + p["found"] for p in report.unsupported)
    assert error.value.message in told and error.value.expected in told and error.value.found in told
    assert error.value.expected and error.value.found and error.value.remedy
    return error.value


@pytest.mark.parametrize("shape, expected", [([1, 2, 1, 5], r"\[1, 2, 1, 5\]"), ([2, 1, 6], r"\[2, 1, 6\]"), ([None, 2, "n"], r"\[\?, 2, \?\]")])
def test_a_declared_output_that_is_none(shape: list[Any], expected: str) -> None:
    model = network()
    name = model.graph.output[0].name
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    error = refused(model, rf"{name}: .*another shape.*expected float32{expected} \(the model's own declaration\); found float32\[2, 1, 5\]")
    assert error.where == name and "declares" in error.remedy


@pytest.mark.parametrize("shape", [[2, 1, 5], ["batch", 1, None], [-1, 1, 0]])
def test_a_declared_output_that_holds_or_leaves_it_open(shape: list[Any]) -> None:
    model = network()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, shape))
    assert ht.inspect(model).compilable


def wider(x: relax.Expr) -> relax.Expr:
    return relax.op.expand_dims(x, [0])


def test_a_handler_that_gives_another_shape_than_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = onnx_node.HANDLERS["", "Relu"]
    monkeypatch.setitem(onnx_node.HANDLERS, ("", "Relu"), replace(entry, handler=lambda node: wider(node.expr(0))))
    error = refused(network(), r"expected .*\[2, 1, 5\] \(ONNX's shape inference\); found .*\[1, 2, 1, 5\]")
    assert "report it" in error.remedy


def test_a_lowering_that_changes_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer is named, wherever in the network it is."""

    def relu(ctx: Any, call: Any, v: Any) -> Any:
        (term,) = v[0].terms
        return replace(v[0], shape=(1, *v[0].shape), terms=(replace(term, data=ctx.emit(wider(term.data), "wide")),))

    monkeypatch.setitem(handlers.HANDLERS, "relax.nn.relu", relu)
    error = refused(network(), r"relu_\d+: .*expected \[2, 1, 5\] \(the model, before it becomes integer\); found \[1, 2, 1, 5\]")
    assert error.where.startswith("relu_")


def changing(change: Callable[[relax.Expr], relax.Expr]) -> pipeline.Pass:
    """A pass that changes what the last dequantize gives."""

    def tamper(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
        last = [b.var.name for b in stages.bindings(module["main"]) if ops.op_name(b.value) == "hawq.dequantize"][-1]

        def visit(rebuild: Any, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
            return change(rebuild.emit(value, "kept")) if binding.var.name == last else None

        return rewrite_main(module, visit), 1

    return tamper


@pytest.mark.parametrize("change, found", [
    (wider, r"float32\[1, 2, 1, 5\]"), (lambda x: relax.op.astype(x, "float16"), r"float16\[2, 1, 5\]"), (lambda x: relax.op.sum(x, [0]), r"float32\[1, 5\]"),
])  # fmt: skip
def test_a_pass_that_changes_an_output(monkeypatch: pytest.MonkeyPatch, change: Callable[[relax.Expr], relax.Expr], found: str) -> None:
    monkeypatch.setattr(pipeline, "PIPELINE", ((changing(change), stages.Stage.ANNOTATED), *pipeline.PIPELINE))
    refused(network(), rf"expected float32\[2, 1, 5\] \(the model, before the step tamper\); found {found}")


def test_what_cannot_be_inferred_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fails)
    assert ht.inspect(network()).compilable


def test_inference_reads_shapes_and_no_weights() -> None:
    """Large weights stay where they are; QONNX's quantizers and Microsoft's have shapes as the standard's."""
    g = Graph(2)
    x = g.node("Quant", [g.input("x", [1, "n"]), *(g.constant(v, TensorProto.FLOAT) for v in (0.1, 0.0, 8.0))], domain="qonnx.custom_op.general")
    w = g.constant(np.zeros((40, 50), np.float32), TensorProto.FLOAT)
    y = g.node("MatMul", [g.node("QuantizeLinear", [x, g.constant(0.1, TensorProto.FLOAT)], domain="com.microsoft"), w])
    model = g.model([float_output(y)])
    from hawq_tvm.frontend.onnx.inputs import Input

    found = infer.inferred(model, [Input("x", "float32", (3, 40))])
    assert found[y].dims == (3, 50) and found[x] == Promise("ONNX's shape inference", "float32", (3, 40))


def test_promises() -> None:
    for kind, dims, holds in [
        ("float32", (2, 3), True), ("float32", (2, None), True), ("", (2, 3), True), ("", None, True), ("int8", (2, 3), False),
        ("float32", (2, 3, 1), False), ("float32", (2,), False), ("float32", (None, 4), False), ("float32", (), False),
    ]:  # fmt: skip
        assert Promise("somebody", kind, dims).holds("float32", (2, 3)) == holds
    contract.check("y", "float32", (2, 3), [])

"""Rows of a table by run-time ids: exact values, and ids outside of the table refused before anything runs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm import runtime
from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import InputError, ModelError, PackageError
from hawq_tvm.package import direct
from hawq_tvm.verify.reference import evaluate
from relay_passes.integer.values import Constant

from ..agreement import agreed
from ..models import TYPES, Graph

RNG = np.random.default_rng(5)
ROWS, WIDTH, STEP = 40, 12, np.float32(0.03)


def table(g: Graph, kind: str) -> tuple[str, np.ndarray]:
    """A float tensor and its values in float32, as ONNX's DequantizeLinear computes them."""
    if kind == "float":
        values = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
        return g.constant(values, TensorProto.FLOAT), values
    proto, low, high = TYPES["int4" if kind == "blocks" else "int8"]
    q = RNG.integers(low, high, (ROWS, WIDTH), endpoint=True)
    shape = {"one scale": (), "by row": (ROWS,), "by column": (WIDTH,), "blocks": (ROWS, 3)}[kind]
    scale = (RNG.uniform(0.3, 1, shape) * 0.02).astype(np.float32)
    attributes: dict[str, Any] = {"by row": {"axis": 0}, "by column": {"axis": 1}}.get(kind, {})
    if kind == "blocks":
        attributes = {"axis": 1, "block_size": 4}
    data = g.node("DequantizeLinear", [g.constant(q, proto), g.constant(scale, TensorProto.FLOAT, shape)], **attributes)
    full = {"by row": scale[:, None] if kind == "by row" else scale, "blocks": np.repeat(scale, 4, -1)}.get(kind, scale)
    return data, q.astype(np.float32) * full


def ending(g: Graph, real: str) -> onnx.ModelProto:
    names = [real, g.constant(STEP, TensorProto.FLOAT, ()), g.constant(3, TensorProto.INT8, ())]
    g.nodes.append(onnx.helper.make_node("QuantizeLinear", names, ["y"], name="last"))
    return g.model([("y", TensorProto.INT8)])


def rounded(real: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(real / STEP) + 3, -128, 127).astype(np.int8)


@pytest.mark.parametrize("kind", ["one scale", "by row", "by column", "blocks", "float"])
@pytest.mark.parametrize("ids", [(2, 7), (5,), ()])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_values(kind: str, ids: tuple[int, ...], dtype: str) -> None:
    g = Graph()
    data, values = table(g, kind)
    which = g.input("ids", list(ids), TensorProto.INT64 if dtype == "int64" else TensorProto.INT32)
    model = ending(g, g.node("Gather", [data, which]))
    package = ht.compile(model)
    (spec,) = package.inputs
    assert spec.range == (-ROWS, ROWS - 1)
    index = RNG.integers(-ROWS, ROWS, ids).astype(dtype)
    np.testing.assert_array_equal(package.run({"ids": index})["y"], rounded(values[index]))
    assert package.verify(random=2, seed=0).ok and package.prove().ok


def test_a_table_of_a_vocabulary() -> None:
    """11.7 million numbers with a scale a row: in doubles, which hold each of them exactly, in seconds."""
    g, rows = Graph(), 30522
    q, scale = RNG.integers(-128, 128, (rows, 384)), RNG.uniform(0.003, 0.02, rows).astype(np.float32)
    parts = [g.constant(q, TensorProto.INT8), g.constant(scale, TensorProto.FLOAT, (rows,))]
    model = ending(
        g, g.node("Gather", [g.node("DequantizeLinear", parts, axis=0), g.input("ids", [9], TensorProto.INT64)])
    )
    packed = pipeline.to_packed(pipeline.import_annotated(model))
    ids = RNG.integers(0, rows, 9)
    (got,) = evaluate(packed, {"ids": ids}).values()
    np.testing.assert_array_equal(got, rounded(q[ids].astype(np.float32) * scale[ids, None]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("most", [127, (1 << 29) - 1, 1 << 40])
def test_doubles_are_fractions_rounded_once(dtype: Any, most: int) -> None:
    values = np.concatenate([RNG.integers(-most, most, 50), [most, -most, 0]])
    scale = RNG.uniform(1e-4, 3, 53).astype(dtype)
    constant = Constant(values, scale)
    np.testing.assert_array_equal(
        constant.doubles, [float(Fraction(int(v)) * Fraction(float(s))) for v, s in zip(values, scale)]
    )


@pytest.fixture(scope="module")
def package() -> ht.Package:
    """Words and segments, behind a movement and a cast of the ids."""
    g = Graph()
    data, _ = table(g, "one scale")
    ids = g.node("Cast", [g.input("ids", [3, 4], TensorProto.INT64)], to=TensorProto.INT32)
    ids = g.node("Reshape", [ids, g.constant([2, 6], TensorProto.INT64)])
    kinds = g.input("kinds", [2, 6], TensorProto.INT64)
    q = g.constant(RNG.integers(-128, 128, (2, WIDTH)), TensorProto.INT8)
    segments = g.dq(q, np.float32(0.01), 0, "int8")
    return ht.compile(ending(g, g.node("Add", [g.node("Gather", [data, ids]), g.node("Gather", [segments, kinds])])))


def test_ids_outside_are_refused_everywhere(package: ht.Package, tmp_path: Path) -> None:
    good = {"ids": np.arange(12).reshape(3, 4), "kinds": np.ones((2, 6), np.int64)}
    assert {i.name: i.range for i in package.inputs} == {"ids": (-ROWS, ROWS - 1), "kinds": (-2, 1)}
    package.save(tmp_path / "e.hawq")
    slim = runtime.load(tmp_path / "e.hawq")
    for run in (package.run, slim.run):
        for name, value in (("ids", ROWS), ("ids", -ROWS - 1), ("kinds", 2), ("kinds", -(2**62))):
            bad = {**good, name: np.full_like(good[name], value)}
            with pytest.raises(
                InputError, match=rf"input {name}: leaves the range that the model takes; expected -\d+"
            ):
                run(bad)
    with direct.Model(package.library, 1) as model:
        model.set_inputs([good["ids"], good["kinds"]])
        model.run()
        np.testing.assert_array_equal(model.outputs()[0], package.run(good)["y"])
        model.set_inputs([good["ids"], good["kinds"] * 2])
        with pytest.raises(PackageError, match="input 1 holds 2, and the model takes -2 to 1"):
            model.run()


def test_computed_positions() -> None:
    """The place of a maximum is one of the table's; a sum of an id and a constant need not be."""
    g = Graph()
    data, values = table(g, "by row")
    x = g.dq(g.input("x", [3, ROWS], TYPES["int8"][0]), 0.1, 0, "int8")
    model = ending(g, g.node("Gather", [data, g.node("ArgMax", [x], axis=1, keepdims=0)]))
    q = RNG.integers(-128, 128, (3, ROWS)).astype(np.int8)
    np.testing.assert_array_equal(ht.compile(model).run({"x": q})["y"], rounded(values[q.argmax(1)]))

    g = Graph()
    data, _ = table(g, "one scale")
    ids = g.node("Add", [g.input("ids", [3], TensorProto.INT64), g.constant([1], TensorProto.INT64)])
    error = agreed(ending(g, g.node("Gather", [data, ids])))
    assert isinstance(error, ModelError) and "its index can be" in str(error)

"""Graphs whose outputs no kernel computes: constants, inputs handed through, movements that move nothing. Each is a package that runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.cuda import nvcc
from hawq_tvm.errors import UsageError

from ..models import Graph, float_output

LEVELS = np.arange(8, dtype=np.uint8)


def constant() -> onnx.ModelProto:
    """A dequantized constant, and nothing else."""
    g = Graph()
    return g.model([float_output(g.dq(g.constant(LEVELS, TensorProto.UINT8), 0.5, 3))])


def handed_through(op: str, kind: int) -> onnx.ModelProto:
    g = Graph()
    return g.model([(g.node(op, [g.input("x", [2, 3], kind)]), kind)])


def twice() -> onnx.ModelProto:
    """One input, and one constant beside it, both returned."""
    g = Graph()
    x, c = g.input("x", [2, 3], TensorProto.UINT8), g.constant(LEVELS, TensorProto.UINT8)
    return g.model([(g.node("Identity", [x]), TensorProto.UINT8), (g.node("Identity", [c]), TensorProto.UINT8), (c, TensorProto.UINT8)])


MODELS = {
    "constant": constant(), "identity": handed_through("Identity", TensorProto.UINT8), "flatten": handed_through("Flatten", TensorProto.INT8),
    "float": handed_through("Identity", TensorProto.FLOAT), "bool": handed_through("Identity", TensorProto.BOOL), "two": twice(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_and_is_verified_and_proved(name: str) -> None:
    model = MODELS[name]
    assert ht.inspect(model).compilable
    package = ht.compile(model)
    feed = package.random_inputs(1, 0)[0]
    outputs = list(package.run(feed).values())
    wanted = [feed.get("x"), LEVELS, LEVELS] if name == "two" else [feed.get("x", (LEVELS - np.float32(3)) * np.float32(0.5))]
    for got, array in zip(outputs, wanted, strict=True):
        np.testing.assert_array_equal(got, array, strict=True)
    for way in ("vm", "c"):
        package.verify(feed, random=1, through=way).raise_if_mismatch()
    assert package.prove().ok and not package.certificate()["kernels"]
    assert package.bench(duration=0.02, warmup_ms=1).median_ms > 0
    assert not package.profile(duration=0.02, warmup_ms=1).rows


@pytest.mark.parametrize("name", ["constant", "identity"])
def test_for_a_gpu(name: str) -> None:
    try:
        nvcc.find()
    except UsageError as e:
        pytest.skip(f"no nvcc: {e}")
    assert ht.compile(MODELS[name], "cuda-sm80").prove().ok


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, package, inputs = (str(tmp_path / n) for n in ("m.onnx", "m.hawq", "in.npz"))
    onnx.save(MODELS["identity"], model)
    np.savez(inputs, x=np.ones((2, 3), np.uint8))
    assert main(["compile", model, "-o", package, "--quiet"]) == 0
    assert "kernels none" in capsys.readouterr().out
    assert main(["info", package]) == 0 and "kernels none" in capsys.readouterr().out
    assert main(["profile", package, "--duration", "0.02", "--svg", str(tmp_path / "t.svg")]) == 0
    for verb, small in (("strip", "s.hawq"), ("pack", "p.hawq")):
        assert main([verb, package, "-o", str(tmp_path / small)]) == 0
        assert main(["run", str(tmp_path / small), "--inputs", inputs, "-o", str(tmp_path / "out.npz")]) == 0
        with np.load(tmp_path / "out.npz") as out:
            np.testing.assert_array_equal(out["identity_0"], np.ones((2, 3), np.uint8), strict=True)


def test_initializers_alone() -> None:
    """A graph without nodes: an initializer that is an output."""
    tensor = helper.make_tensor("w", TensorProto.INT8, [3], [1, -2, 3])
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("w", TensorProto.INT8, [3])], [tensor])
    package = ht.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10))
    np.testing.assert_array_equal(package.run({})["w"], np.array([1, -2, 3], np.int8), strict=True)

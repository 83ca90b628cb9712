"""The float graph: every operator against ONNX's own evaluator, its hooks, programs of torch.export, and what it
refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.quantize.network.load import load_float

from ..models import residual_net as quantized_net
from .networks import FloatNet, TorchNet, images, residual_net


def run(model: onnx.ModelProto, x: Any) -> Any:
    graph = load_float(model)
    with torch.no_grad():
        (value,) = graph.run({"x": x}).values()
    return value.numpy()


POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
CASES: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("AveragePool", {**POOL, "pads": [1, 1, 1, 1]}, ()),
    ("AveragePool", {**POOL, "pads": [0, 1, 1, 0]}, ()),
    ("AveragePool", {**POOL, "pads": [1, 1, 1, 1], "count_include_pad": 1}, ()),
    ("AveragePool", {**POOL, "ceil_mode": 1}, ()),
    ("MaxPool", {**POOL, "pads": [1, 1, 1, 1]}, ()),
    ("MaxPool", {**POOL, "pads": [0, 0, 2, 1]}, ()),
    ("GlobalAveragePool", {}, ()),
    ("Relu", {}, ()),
    ("Sigmoid", {}, ()),
    ("HardSigmoid", {"alpha": 0.3}, ()),
    ("HardSwish", {}, ()),
    ("LeakyRelu", {"alpha": 0.2}, ()),
    ("Elu", {}, ()),
    ("Clip", {}, (np.float32(-0.5), np.float32(1))),
    ("Softmax", {"axis": 1}, ()),
    ("LogSoftmax", {}, ()),
    ("Flatten", {"axis": 2}, ()),
    ("Reshape", {}, (np.array([0, -1, 7]),)),
    ("Transpose", {"perm": [0, 2, 3, 1]}, ()),
    ("ReduceMean", {}, (np.array([2, 3]),)),
    ("ReduceMean", {"keepdims": 0}, (np.array([-1]),)),
    ("Pow", {}, (np.float32(2),)),
    ("Pad", {}, (np.array([0, 0, 1, 2, 0, 0, 0, 3]), np.float32(2))),
    ("Pad", {"mode": "reflect"}, (np.array([0, 0, 1, 2, 0, 0, 0, 3]),)),
    ("Add", {}, (np.ones((3, 1, 1), np.float32),)),
    ("Unsqueeze", {}, (np.array([0, -1]),)),
    ("Gather", {"axis": 1}, (np.array([0, -1]),)),
    ("Slice", {}, (np.array([1]), np.array([-1]), np.array([2]))),
    ("Slice", {}, (np.array([6]), np.array([0]), np.array([3]), np.array([-2]))),
    ("PRelu", {}, (np.full((3, 1, 1), 0.3, np.float32),)),
    ("Gelu", {}, ()),
    ("Softplus", {}, ()),
    ("Max", {}, (np.float32(0.1),)),
    ("Mean", {}, (np.float32(0.1), np.float32(3))),
    ("ReduceMax", {}, (np.array([1, 3]),)),
    ("ReduceMin", {"keepdims": 0}, (np.array([0]),)),
    ("Celu", {"alpha": 0.7}, ()),
    ("Softsign", {}, ()),
    ("Round", {}, ()),
    ("Sin", {}, ()),
    ("Pad", {"mode": "edge"}, (np.array([0, 1, 1, 2, 0, 0, 0, 3]),)),
    ("Pad", {"mode": "wrap"}, (np.array([0, 0, 1, 2, 0, 0, 2, 3]),)),
    ("Tile", {}, (np.array([1, 2, 1, 3]),)),
    ("SpaceToDepth", {"blocksize": 1}, ()),
    ("Size", {}, ()),
    ("ArgMax", {"axis": 2}, ()),
    ("LayerNormalization", {"axis": 2}, (np.ones((9, 7), np.float32), np.full((9, 7), 2, np.float32))),
    ("InstanceNormalization", {}, (np.float32([1, 2, 3]), np.float32([0, 1, 2]))),
    ("Resize", {"mode": "linear"}, (np.zeros(0, np.float32), np.float32([1, 1, 2, 1.5]))),
    ("Resize", {}, (np.zeros(0, np.float32), np.float32([1, 1, 0.6, 2]))),
    # What no torch function stands for goes through ONNX's own reference.
    ("CumSum", {}, (np.array(3),)),
    ("Trilu", {}, ()),
    ("Mod", {"fmod": 1}, (np.float32(0.7),)),
]


@pytest.mark.parametrize(("op", "attrs", "constants"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_operators_equal_onnx(op: str, attrs: dict[str, Any], constants: tuple[Any, ...]) -> None:
    g = FloatNet([2, 3, 9, 7], opset=20)
    model = g.model(g.node(op, "x", *(g.constant(c, np.asarray(c).dtype) for c in constants), **attrs))
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 7)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize(
    ("op", "attrs", "others"),
    [
        ("Einsum", {"equation": "ncij,nckj->nki"}, [(2, 4, 5, 7)]),
        ("RMSNormalization", {"axis": 2, "epsilon": 0.1}, [(9, 7)]),
        ("Attention", {"scale": 0.3}, [(2, 2, 5, 7), (2, 2, 5, 3), (9, 5)]),
        ("Attention", {"is_causal": 1}, [(2, 4, 9, 7), (2, 4, 9, 3)]),
        ("Attention", {}, [(2, 4, 5, 7), (2, 4, 5, 3), "mask"]),
    ],
)
def test_operators_of_several_tensors_equal_onnx(op: str, attrs: dict[str, Any], others: list[Any]) -> None:
    g = FloatNet([2, 4, 9, 7], seed=2, opset=23)
    mask = np.eye(9, 5, dtype=bool) | (g.rng.random((9, 5)) < 0.5)
    mask[:, 0] |= ~mask.any(1)
    given = [g.constant(mask, bool) if shape == "mask" else g.random(*shape) for shape in others]
    model = g.model(g.node(op, "x", *given, **attrs))
    x = g.rng.standard_normal((2, 4, 9, 7)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    real = load_float(model)
    real.run({"x": torch.from_numpy(x).requires_grad_()})[real.outputs[0]].sum().backward()


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"pads": [1, 0, 2, 1], "strides": [2, 1]},
        {"dilations": [2, 2], "group": 3},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_convolutions_equal_onnx(attrs: dict[str, Any]) -> None:
    g = FloatNet([2, 3, 9, 7])
    model = g.model(g.conv("x", 6, 3, 3, "c", kernel_shape=[3, 3], **attrs))
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 7)).astype(np.float32)
    # Float32 sums in another order.
    np.testing.assert_allclose(run(model, x), ReferenceEvaluator(model).run(None, {"x": x})[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"pads": [1, 0, 2, 1], "strides": [2, 3], "output_padding": [1, 2]},
        {"dilations": [2, 2], "group": 2},
        {"auto_pad": "SAME_LOWER", "strides": [3, 3]},
        {"output_shape": [19, 16], "strides": [2, 2]},
    ],
    ids=str,
)
def test_transposed_convolutions_equal_onnx(attrs: dict[str, Any]) -> None:
    g = FloatNet([2, 4, 9, 7])
    model = g.model(g.node("ConvTranspose", "x", g.random(4, 3, 3, 4), g.random(3 * attrs.get("group", 1)), **attrs))
    x = np.random.default_rng(1).standard_normal((2, 4, 9, 7)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    (layer,) = load_float(model).layers
    assert (layer.kind, layer.channel_axis, layer.repeats) == ("deconv", 1, attrs.get("group", 1))


def test_depth_and_space() -> None:
    x = np.random.default_rng(1).standard_normal((2, 8, 4, 6)).astype(np.float32)
    for op, mode in (("DepthToSpace", {"mode": "CRD"}), ("DepthToSpace", {}), ("SpaceToDepth", {})):
        g = FloatNet([2, 8, 4, 6])
        model = g.model(g.node(op, "x", blocksize=2, **mode))
        assert (run(model, x) == ReferenceEvaluator(model).run(None, {"x": x})[0]).all()


def test_what_has_no_derivative_says_so() -> None:
    g = FloatNet([1, 3, 4, 4])
    graph = load_float(g.model(g.node("CumSum", g.conv("x", 2, 3, 1, "c"), g.constant(1, np.int64), name="total")))
    with pytest.raises(ModelError, match=r"total: CumSum has no derivative here; remedy: choose the bits"):
        graph.run({"x": torch.zeros(1, 3, 4, 4, requires_grad=True)})


def test_a_network_and_its_layers() -> None:
    model, x = residual_net(), images(3)
    graph = load_float(model)
    # Float32 sums in another order.
    np.testing.assert_allclose(run(model, x), ReferenceEvaluator(model).run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)
    assert [one.name for one in graph.layers] == ["stem", "a1", "a2", "short", "b1", "b2", "fc"]
    assert graph.layer("a1").input == graph.layer("short").input and graph.layer("a1").strides == (2, 2)
    assert graph.batch is None and load_float(residual_net(batch=4)).batch == 4
    assert (graph.layer("fc").kind, graph.layer("fc").channel_axis) == ("matmul", 0)


def test_record_and_feed_see_and_replace() -> None:
    graph, x = load_float(residual_net()), images(1)
    seen: list[str] = []
    plain = graph.run({"x": x}, record=lambda name, value: seen.append(name))
    assert seen[0] == "x" and set(graph.outputs) <= set(seen) and len(seen) == 1 + len(graph.nodes)
    other = graph.run(
        {"x": x}, record=lambda name, value: torch.zeros_like(value) if name == graph.layer("b1").output else None
    )
    fed = graph.run(
        {"x": x}, feed=lambda node, i, value: torch.zeros_like(value) if node == "short" and i == 1 else None
    )
    given = graph.run({"x": x}, parameters={graph.layer("short").weight: torch.zeros(6, 4, 1, 1)})
    assert all((plain[k] != other[k]).any() and (fed[k] == given[k]).all() for k in plain)
    with pytest.raises(InputError, match="expected x; found y"):
        graph.run({"y": x})


def test_weights_behind_constant_operators_are_layers() -> None:
    g = FloatNet([2, 4])
    w = g.node("Transpose", g.random(3, 4))
    graph = load_float(g.model(g.node("MatMul", "x", w, name="")))
    (layer,) = graph.layers
    assert (
        layer.name == layer.output == "matmul_1"
        and graph.parameters[layer.weight].shape == (4, 3)
        and layer.channel_axis == 1
    )


def test_programs(tmp_path: Path) -> None:
    net, x = TorchNet().eval(), torch.from_numpy(images(2))
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "net.pt2")
    for source in (program, tmp_path / "net.pt2"):
        graph = load_float(source)
        assert [one.name for one in graph.layers] == ["stem", "deep", "fc"] and graph.batch is None
        assert (
            graph.layer("deep").group == 2
            and graph.layer("stem").strides == (2, 2)
            and graph.layer("stem").before == (1, 1)
        )
        with torch.no_grad():
            three = torch.from_numpy(images(3))
            assert (graph.run({graph.inputs[0].name: three})[graph.outputs[0]] == net(three)).all()
    with pytest.raises(ModelError, match=r"statistics of its batch.*eval"):
        load_float(torch.export.export(TorchNet().train(), (x,)))
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    for name in ("bad.pt2", "none.pt2"):
        with pytest.raises(ModelError, match=r"readable exported program|no such file"):
            load_float(tmp_path / name)


def test_refusals() -> None:
    g = FloatNet([1, 3, 8, 8])
    with pytest.raises(ModelError, match=r"strange: operator GridSample is not supported.*replace it"):
        load_float(g.model(g.node("GridSample", "x", g.random(1, 2, 2, 2), name="strange")))
    with pytest.raises(ModelError, match=r"quantized model; expected a float model"):
        load_float(quantized_net())
    with pytest.raises(UsageError, match=r"no weighted layer 'a3'.*did you mean 'a[12]'"):
        load_float(residual_net()).layer("a3")


def test_every_unknown_operator_is_named() -> None:
    g = FloatNet([1, 3, 8, 8])
    y = g.node("Det", g.node("GridSample", "x", "x", name="strange"), name="stranger")
    with pytest.raises(ModelError, match="strange: operator GridSample is not supported") as found:
        load_float(g.model(y))
    assert [p["layer"] for p in found.value.problems()] == ["strange", "stranger"]


def test_nodes_that_are_damaged() -> None:
    g = FloatNet([1, 3, 8, 8])
    for node, message in (
        (onnx.helper.make_node("Relu", ["x"], []), "Relu has no outputs"),
        (
            onnx.helper.make_node("MaxPool", ["x"], ["y"], name="pool"),
            "pool: MaxPool has attributes that are not understood",
        ),
    ):
        model = g.model("y")
        model.graph.node.append(node)
        with pytest.raises(ModelError, match=message):
            load_float(model)
    g = FloatNet([1, 3, 8, 8])
    broken = g.node("Reshape", g.constant([1.0, 2.0]), g.constant([3], np.int64), name="folded")
    with pytest.raises(ModelError, match="folded: Reshape cannot be computed on data of this shape"):
        load_float(g.model(broken))

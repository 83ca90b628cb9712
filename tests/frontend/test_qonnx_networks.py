"""QONNX's own executor as oracle: its operators, its trained networks, and a network trained and exported by Brevitas.

The executor computes in float32, so it may land on the other side of a rounding boundary. Every layer is compared on
the executor's own integers, and each difference must be one step and lie at a boundary, as in
tests/e2e/test_onnxruntime.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm.core import ops
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx
from hawq_tvm.verify.reference import evaluate

from ..e2e.test_onnxruntime import Oracle, session
from ..models import float_output
from .test_qonnx import GENERAL, MODES, QonnxGraph

qonnx = pytest.importorskip("qonnx", reason="qonnx cannot be installed beside onnx 1.23 on Python 3.10")
F = np.float32


@pytest.fixture(autouse=True)
def _an_ir_version_that_onnxruntime_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The executor makes one model per node, of the IR version of onnx; ONNX Runtime 1.31 reads up to 13."""
    monkeypatch.setattr(onnx, "IR_VERSION", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def executed(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor of a model by name, by QONNX's executor."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    return execute_onnx(ModelWrapper(model).transform(InferShapes()), feed, return_full_exec_context=True)


def integers_of(model: onnx.ModelProto, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The integers behind each activation quantizer with zero point 0, by the name our importer gives them."""
    constants = {t.name for t in model.graph.initializer} | {
        n.output[0] for n in model.graph.node if n.op_type == "Constant"
    }
    found = {}
    for n in model.graph.node:
        if n.op_type in ("Quant", "Trunc") and n.input[0] not in constants:
            scale = tensors[n.input[4 if n.op_type == "Trunc" else 1]].astype(np.float64)
            found[f"{n.name}.q"] = np.rint(tensors[n.output[0]].astype(np.float64) / scale)
    return found


class DirectedOracle(Oracle):
    """An Oracle whose boundaries are those of each quantize's own rounding: integers for floor, halves for the
    nearest.
    """

    def _compare(self, b: Any) -> None:
        if str(b.value.attrs["rounding"]) == "half_even":
            super()._compare(b)
            return
        ours, theirs = self.env[b.var], self.theirs[b.var.name].astype(self.env[b.var].dtype)
        real = np.asarray(self.value(b.value.args[0]), np.float64) / ops.const_value(b.value.args[1]).astype(np.float64)
        reach = 2.0**-24 * 64 * np.maximum(np.abs(real), 1)  # as `explained` has it
        at = (np.abs(ours.astype(np.int64) - theirs) == 1) & (np.abs(real - np.rint(real)) <= reach)
        self.rows[b.var.name] = (ours.size, int((ours != theirs).sum()), int(((ours != theirs) & ~at).sum()))
        self.env[b.var] = theirs


def compare(
    name: str, model: onnx.ModelProto, x: np.ndarray, layers: int, most_steps: int, **options: Any
) -> ht.Package:
    """Every layer on the executor's integers, then the library from end to end; prints what differs."""
    (entry,) = [i.name for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}]
    tensors = executed(model, {entry: x})
    oracle = DirectedOracle(import_onnx(model), integers_of(model, tensors))
    oracle.run({entry: x})
    assert len(oracle.rows) == layers
    elements, different, unexplained = (sum(r[i] for r in oracle.rows.values()) for i in range(3))
    package = ht.compile(model, **options)
    package.verify({entry: x}).raise_if_mismatch()
    assert package.prove().ok
    out = package.outputs[0]
    ours, theirs = package.run({entry: x})[out.name], tensors[out.name]
    steps = np.rint(np.abs(ours.astype(np.float64) - theirs) / out.quantization.scale[0])
    print(
        f"\n{name}: {layers} layers, {different} of {elements} elements differ from QONNX's executor, {unexplained} not"
        f" at a rounding boundary; end to end {int((steps > 0).sum())} of {steps.size} outputs differ, by at most"
        f" {int(steps.max())} steps"
    )
    assert unexplained == 0, {k: r for k, r in oracle.rows.items() if r[2]}
    # Float32 boundaries are rare: more would be a misread rule.
    assert steps.max() <= most_steps and np.mean(steps > 0) < 1e-3
    return package


ESPCN = Path(qonnx.__file__).parent / "data" / "onnx" / "bsd300x3-espcn"


def picture() -> np.ndarray:
    """The picture that comes with the networks, in 0 to 1."""
    tensor = onnx.TensorProto()
    tensor.ParseFromString((ESPCN / "test_data" / "input_0.pb").read_bytes())
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.slow
def test_trained_espcn_with_resize() -> None:
    """Weights of 8, 4, 4 and 8 bits, activations of 8 and 4; all of it integer, the input's ReLU included."""
    package = compare(
        "ESPCN, nearest resize", onnx.load(str(ESPCN / "nn_resize" / "quant_model.onnx")), picture(), 5, 1
    )
    assert not package.manifest.get("float_tail")


@pytest.mark.slow
def test_trained_espcn_with_depth_to_space() -> None:
    """Its first convolution reads the float picture itself: refused without a float head or the picture's range."""
    model = onnx.load(str(ESPCN / "subpixel" / "quant_model.onnx"))
    with pytest.raises(ModelError, match=r"the float input .*nothing tells its range.*--allow-float-tail"):
        ht.compile(model)
    compare("ESPCN, depth to space", model, picture(), 4, 1, allow_float_tail=True)


# ROUND_TO_ZERO is Brevitas's name, which QONNX's executor does not know.
@pytest.mark.parametrize("mode", [m for m in MODES if m != "ROUND_TO_ZERO"])
def test_operators_at_random(mode: str) -> None:
    """Quant, BipolarQuant and Trunc of random floats, on the executor's side in float32."""
    g = QonnxGraph(11)
    x = np.concatenate([g.rng.normal(0, 9, 3990), np.arange(-5, 5) / 4]).astype(F)
    g.input("x", [4000])
    made: list[str] = []
    for bits, signed, narrow, zero in [
        (8, 1, 0, 0),
        (8, 0, 1, 97),
        (4, 1, 1, -3),
        (3, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 0, 0, 0),
        (6, 1, 0, 5),
    ]:
        scale = g.rng.uniform(0.05, 2)
        made.append(g.quant("x", scale, zero, bits, signed=signed, narrow=narrow, rounding_mode=mode))
    made.append(g.node("BipolarQuant", ["x", g.real(0.3)], GENERAL))
    model = g.model([float_output(y) for y in made])
    for info in model.graph.output:
        info.type.tensor_type.shape.dim.add().dim_value = 4000
    theirs, ours = executed(model, {"x": x}), evaluate(import_onnx(model), {"x": x})
    for y in made:
        assert np.count_nonzero(ours[y].astype(F) != theirs[y]) == 0, y


@pytest.mark.parametrize("version", [1, 2])
def test_trunc_at_random(version: int) -> None:
    g = QonnxGraph(12)
    x = (g.rng.integers(-(2**9), 2**9, 3000) * 0.25).astype(F)
    g.input("x", [3000])
    made = []
    for mode in MODES[:6] + MODES[7:]:
        out, attrs = ([4], {}) if version == 1 else ([0.25 * 2**6, 4], {"signed": 1, "narrow": 1})
        made.append(g.trunc("x", 0.25, 0, 10, out, rounding_mode=mode, **attrs))
    model = g.model([float_output(y) for y in made])
    model.opset_import[1].version = version
    for info in model.graph.output:
        info.type.tensor_type.shape.dim.add().dim_value = 3000
    theirs, ours = executed(model, {"x": x}), evaluate(import_onnx(model), {"x": x})
    for y in made:
        np.testing.assert_array_equal(ours[y].astype(F), theirs[y])


def brevitas_network(quantized_bias: bool) -> tuple[Any, np.ndarray]:
    """A small residual network of mixed widths, trained for a few steps, and an input."""
    pytest.importorskip("brevitas", reason="brevitas is a test dependency from Python 3.11 on")
    pytest.importorskip("onnxoptimizer", reason="Brevitas exports with onnxoptimizer")
    import torch
    from brevitas import nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias
    from torch import nn

    torch.manual_seed(0)
    bias = Int32Bias if quantized_bias else None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared: dict[str, Any] = {
                "bias": True,
                "bias_quant": bias,
                "padding": 1,
                "weight_quant": Int8WeightPerChannelFloat,
            }
            self.input = qnn.QuantIdentity(bit_width=8, return_quant_tensor=True)
            self.first = qnn.QuantConv2d(3, 16, 3, weight_bit_width=8, **shared)
            self.norm = nn.BatchNorm2d(16)
            self.relu = qnn.QuantReLU(bit_width=4, return_quant_tensor=True)
            self.second = qnn.QuantConv2d(16, 16, 3, weight_bit_width=4, **shared)
            self.same = qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=6, return_quant_tensor=True)
            self.third = qnn.QuantConv2d(16, 16, 3, weight_bit_width=3, groups=16, **shared)
            self.relu2 = qnn.QuantReLU(bit_width=5, return_quant_tensor=True)
            self.pool = qnn.TruncAvgPool2d(4, bit_width=5, float_to_int_impl_type="floor")
            self.last = qnn.QuantLinear(16 * 4, 10, bias=True, bias_quant=bias, weight_bit_width=7)
            self.out = qnn.QuantIdentity(bit_width=8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu(self.norm(self.first(self.input(x))))
            x = self.same(x) + self.same(self.second(x))
            x = self.pool(self.relu2(self.third(self.same(x))))
            return self.out(self.last(torch.flatten(x, 1)))

    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(12):
        data = torch.randn(8, 3, 8, 8)
        loss = nn.functional.cross_entropy(net(data), data.mean((1, 2, 3)).mul(40).long().clamp(0, 9))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), np.random.default_rng(4).normal(size=(1, 3, 8, 8)).astype(F)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_brevitas_network_as_qonnx(dynamo: bool, tmp_path: Path) -> None:
    net, x = brevitas_network(quantized_bias=True)
    import torch
    from brevitas.export import export_qonnx

    options: dict[str, Any] = {} if dynamo else {"dynamo": False, "opset_version": 13}
    export_qonnx(net, args=torch.from_numpy(x), export_path=str(tmp_path / "net.onnx"), **options)
    model = onnx.load(str(tmp_path / "net.onnx"))
    assert {"Quant", "Trunc"} <= {n.op_type for n in model.graph.node}
    package = compare(f"Brevitas, dynamo={dynamo}", model, x, 8, 1)
    with torch.no_grad():
        wanted = net(torch.from_numpy(x))
    wanted = getattr(wanted, "value", wanted).numpy()
    out = package.outputs[0]
    steps = np.abs(package.run({package.inputs[0].name: x})[out.name] - wanted) / out.quantization.scale[0]
    assert np.rint(steps).max() <= 1  # float32 in PyTorch: one step at a boundary


def test_a_brevitas_network_as_qcdq(tmp_path: Path) -> None:
    """The same network as QuantizeLinear, Clip and DequantizeLinear; ONNX Runtime is its oracle."""
    net, x = brevitas_network(quantized_bias=True)
    import torch
    from brevitas.export import export_onnx_qcdq

    export_onnx_qcdq(
        net, args=torch.from_numpy(x), export_path=str(tmp_path / "net.onnx"), dynamo=False, opset_version=13
    )
    model = onnx.load(str(tmp_path / "net.onnx"))
    assert {"QuantizeLinear", "Clip"} <= {n.op_type for n in model.graph.node} and not any(
        n.domain for n in model.graph.node
    )
    package = ht.compile(model)
    name = package.inputs[0].name
    package.verify({name: x}).raise_if_mismatch()
    quantizers = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "Clip")]
    whole = onnx.shape_inference.infer_shapes(model)
    whole.graph.output.extend([v for v in whole.graph.value_info if v.name in {n.output[0] for n in quantizers}])
    runtime = session(whole)
    tensors = dict(zip([o.name for o in runtime.get_outputs()], runtime.run(None, {name: x}), strict=True))
    oracle = Oracle(import_onnx(model), {n.name: tensors[n.output[0]] for n in quantizers if n.output[0] in tensors})
    oracle.run({name: x})
    elements, different, unexplained = (sum(r[i] for r in oracle.rows.values()) for i in range(3))
    print(
        f"\nBrevitas as QCDQ: {different} of {elements} elements differ from ONNX Runtime, {unexplained} not at a"
        " rounding boundary"
    )
    assert len(oracle.rows) >= 8 and unexplained == 0, oracle.rows

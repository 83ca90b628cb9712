"""`compare-fake`: differences against exact rational arithmetic, NumPy and ONNX Runtime; ours is 0; figures, JSON
and refusals.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import ModelError
from hawq_tvm.package.package import Package
from hawq_tvm.quantize.judge.fake_comparison import Comparison, compare_fake
from hawq_tvm.quantize.judge.fake_figure import draw
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.verify.compare import LayerRun

from .. import models
from ..frontend.torch.programs import pt2e
from .networks import TorchNet, images, residual_net

Array = np.ndarray[Any, Any]
CHANNELS, RUNS = 4, 3
STEMS = ("w8", "w4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake")
    net = residual_net(batch=1)
    onnx.save(net, str(folder / "net.onnx"))
    np.savez(folder / "in.npz", x=images(RUNS))
    for stem, bits in zip(STEMS, (8, 4), strict=True):
        found = post_training(net, folder / "in.npz", Recipe(bits, rounding="nearest"))
        onnx.save(found.model, str(folder / f"{stem}.onnx"))
        ht.compile(folder / f"{stem}.onnx").save(folder / f"{stem}.hawq")
    return folder


@pytest.fixture(scope="module")
def compared(place: Path) -> dict[str, Comparison]:
    """Both networks beside the float one."""
    return {
        stem: compare_fake(place / f"{stem}.onnx", place / f"{stem}.hawq", place / "in.npz", real=place / "net.onnx")
        for stem in STEMS
    }


def norm(value: Array, deployed: Array) -> float:
    return float(np.linalg.norm(value - deployed) / np.linalg.norm(deployed))


def saved(model: onnx.ModelProto, folder: Path, *inputs: Array) -> tuple[Path, Path, Path]:
    """A model, its package, and inputs called x."""
    onnx.save(model, str(folder / "m.onnx"))
    ht.compile(folder / "m.onnx").save(folder / "m.hawq")
    np.savez(folder / "in.npz", x=np.concatenate(inputs))
    return folder / "m.onnx", folder / "m.hawq", folder / "in.npz"


# -- against exact arithmetic
# ---------------------------------------------------------------------------------------------


def ties(kind: str) -> tuple[onnx.ModelProto, list[Any]]:
    """Two residual sums of scale 0.1 tensors at the scale 0.6, where float32 meets ties that the exact ratio does
    not; then 4 bits, in one kernel with the second.
    """
    _, low, high = models.TYPES[kind]
    zero = (low + high + 1) // 2
    g = models.Graph(3)
    x = g.qdq(g.input("x", [1, CHANNELS, 6, 6]), np.float32(0.1), zero, kind)
    plan: list[Any] = [(np.float32(0.1), zero, low, high)]
    for _ in range(2):
        weights = g.rng.integers(1, 8, (CHANNELS, 1, 1, 1))
        scale = np.float32(0.2)
        w = g.dq(g.constant(weights, onnx.TensorProto.INT8), scale, 0, "int8")
        z = g.qdq(g.conv(x, w, group=CHANNELS), np.float32(0.1), zero, kind)
        x = g.qdq(g.node("Add", [z, x]), np.float32(0.6), zero, kind)
        plan.append((weights.reshape(-1), scale, np.float32(0.1), np.float32(0.6)))
    return g.model([models.float_output(g.qdq(x, np.float32(1.7), 7, "uint4"))]), plan


def exact(x: Array, plan: list[Any]) -> list[Array]:
    """The integers of both sums in rational arithmetic on the scales that the file holds; round() takes a tie to
    even.
    """
    scale, zero, low, high = plan[0]
    quantized = np.clip(np.rint(x / scale), low - zero, high - zero).astype(int)
    step, found = Fraction(float(scale)), []
    for weights, w_scale, mid, out in plan[1:]:
        ratio, mid, out = (
            step * Fraction(float(w_scale)) / Fraction(float(mid)),
            Fraction(float(mid)),
            Fraction(float(out)),
        )
        result = np.zeros_like(quantized)
        for i, q in np.ndenumerate(quantized):
            z = min(max(round(int(q) * int(weights[i[1]]) * ratio), low - zero), high - zero)
            result[i] = min(max(round((z * mid + int(q) * step) / out), low - zero), high - zero)
        quantized, step = result, out
        found.append(result + zero)
    return found


def single(x: Array, plan: list[Any]) -> list[Array]:
    """The same in float32."""
    scale, zero, low, high = plan[0]

    def rounded(v: Array, s: Any) -> Array:
        return np.clip(np.rint(v / s), np.float32(low - zero), np.float32(high - zero)) * s

    value, found = rounded(x, scale), []
    for weights, w_scale, mid, out in plan[1:]:
        value = rounded(rounded(value * (weights.astype(np.float32) * w_scale)[:, None, None], mid) + value, out)
        found.append(np.rint(value / out).astype(int) + zero)
    return found


@pytest.mark.parametrize("kind", ["uint8", "uint4"])
def test_the_quantized_model_in_float32(kind: str, tmp_path: Path) -> None:
    model, plan = ties(kind)
    spread = 6.0 if kind == "uint8" else 0.5
    xs = [
        (spread * np.random.default_rng(i).standard_normal((1, CHANNELS, 6, 6))).astype(np.float32) for i in range(RUNS)
    ]
    found = compare_fake(*saved(model, tmp_path, *xs))
    assert found.exact and found.residual and found.runs == RUNS and len(found.blocks) == 2
    assert [row.inside for row in found.blocks] == [False, True] and {row.bits for row in found.blocks} == {
        8 if kind == "uint8" else 4
    }
    zero = plan[0][1]
    for run, x in enumerate(xs):
        for row, fake, deployed in zip(found.blocks, single(x, plan), exact(x, plan), strict=True):
            assert row.curves["ours"][run] == 0
            # Both are float64 norms, in another order.
            assert row.curves["fake"][run] == pytest.approx(norm(fake - zero, deployed - zero), rel=1e-12)
    if kind == "uint8":
        assert found.blocks[0].curves["fake"][0] > 0  # or the scales met no tie, and nothing was tested


def test_tensors_as_wide_as_they_have_channels(tmp_path: Path) -> None:
    """[2, 8, 8, 8] is as possible in either order of axes."""
    model = models.residual_net()
    xs = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32) * 2
    found = compare_fake(*saved(model, tmp_path, xs))
    (block,) = found.blocks
    assert found.runs == 2 and found.images_per_run == 2 and block.elements == 2 * 8 * 8 * 8
    assert found.exact and block.curves["ours"] == [0, 0]
    assert max(block.curves["fake"]) < 1e-2  # in the other order of axes it is about 1
    assert not found.left_out and not found.not_matched


# -- against ONNX Runtime
# ---------------------------------------------------------------------------------------------------


def simulated_by_onnxruntime(net: onnx.ModelProto, quantized: onnx.ModelProto, x: Array) -> list[Array]:
    """Every residual sum after its ReLU, of the float network with Q and DQ before its layers and the rounded
    weights in them, before BatchNormalization.
    """
    constants = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    floats = {t.name: numpy_helper.to_array(t) for t in net.graph.initializer}
    layers = {n.name: n for n in quantized.graph.node}
    model = onnx.ModelProto()
    model.CopyFrom(net)
    model.opset_import[0].version = 21
    nodes, outputs = [], []
    for node in list(model.graph.node):
        if node.op_type in ("Conv", "Gemm"):
            made = next(n for n in quantized.graph.node if n.output[0] == layers[node.name].input[0])
            for name in made.input[1:3]:
                if name not in {t.name for t in model.graph.initializer}:
                    model.graph.initializer.append(next(t for t in quantized.graph.initializer if t.name == name))
            names = [f"{node.name}_q", f"{node.name}_dq"]
            nodes += [
                helper.make_node("QuantizeLinear", [node.input[0], *made.input[1:3]], names[:1]),
                helper.make_node("DequantizeLinear", [names[0], *made.input[1:3]], names[1:]),
            ]
            given = floats[node.input[1]]
            codes, scale = (
                constants[f"{node.name}_weight_quantized"].astype(np.float32),
                constants[f"{node.name}_weight_scale"],
            )
            norms = [n for n in net.graph.node if n.op_type == "BatchNormalization" and n.input[0] == node.output[0]]
            factor = (
                floats[norms[0].input[1]] / np.sqrt(floats[norms[0].input[4]] + 1e-5) if norms else np.ones(len(given))
            )
            weight = codes * (scale / factor).reshape(-1, *[1] * (given.ndim - 1))
            model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), f"{node.name}_w"))
            node.input[0], node.input[1] = names[1], f"{node.name}_w"
        nodes.append(node)
        outputs += [r.output[0] for r in net.graph.node if node.op_type == "Add" and node.output[0] in r.input]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )


@pytest.mark.parametrize("stem", STEMS)
def test_the_float_network_simulated(stem: str, place: Path, compared: dict[str, Comparison]) -> None:
    found = compared[stem]
    assert (
        found.precision == ("W8A8" if stem == "w8" else "W4A4")
        and not found.not_matched
        and len(found.blocks) == 2
        and found.exact
    )
    quantized = onnx.load(str(place / f"{stem}.onnx"))
    package = ht.load(place / f"{stem}.hawq")
    constants = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    for run, x in enumerate(images(RUNS)):
        written = dict(zip(kernels(package), package.run_layers({"x": x[None]}).layers, strict=True))
        theirs = simulated_by_onnxruntime(onnx.load(str(place / "net.onnx")), quantized, x[None])
        for row, value in zip(found.blocks, theirs, strict=True):
            node = next(n for n in quantized.graph.node if n.name == row.layer)
            scale, zero = constants[node.input[1]], int(constants[node.input[2]])
            integers = written[row.kernel].transpose(0, 3, 1, 2).astype(int)
            # Their sums are in float32, in another order: one activation may be rounded to the next step.
            assert row.curves["simulated"][run] == pytest.approx(
                norm(value, (integers - zero) * float(scale)), rel=0.02
            )
            high = float(np.iinfo(np.uint8).max if row.bits == 8 else 15)
            # As above.
            assert row.curves["simulated_rounded"][run] == pytest.approx(
                norm(np.clip(np.rint(value / scale), 0, high), integers), rel=0.02
            )
    assert all(row.spread("simulated").mean > 1e-3 for row in found.blocks)  # type: ignore[union-attr]
    first = found.rows[0]
    assert first.curves["simulated"] == first.curves["fake"] == [0] * RUNS  # the input, rounded by all alike


def kernels(package: Package) -> list[str]:
    from hawq_tvm.verify.compare import layer_calls

    return [b.var.name for b in layer_calls(package.graph)]


# -- as a user meets it
# ---------------------------------------------------------------------------------------------------


def arguments(place: Path, figure: Path, *more: str) -> list[str]:
    pairs = [str(place / f"{stem}.{end}") for stem in STEMS for end in ("onnx", "hawq")]
    return ["compare-fake", *pairs, "--data", str(place / "in.npz"), "-o", str(figure), "--quiet", *more]


def test_figures_and_json(
    place: Path, tmp_path: Path, compared: dict[str, Comparison], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path / "f.png", "--float", str(place / "net.onnx"), "--limit", "2", "--json")) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert fields["figure"].endswith("f.png") and [p["precision"] for p in fields["pairs"]] == ["W8A8", "W4A4"]
    for pair in fields["pairs"]:
        assert (
            pair["exact"]
            and pair["runs"] == 2
            and pair["blocks_are"] == "residual sums"
            and len(pair["blocks"]) == 2
            and len(pair["layers"]) >= 7
        )
        for row in pair["layers"]:
            assert (
                row["ours"] == {"mean": 0, "deviation": 0, "least": 0, "greatest": 0}
                and row["differing"] == 0
                and row["elements"] > 0
            )
        for row in pair["blocks"]:
            assert (
                row in pair["layers"]
                and row["simulated"]["least"] <= row["simulated"]["mean"] <= row["simulated"]["greatest"]
            )
    pictures = [draw(list(compared.values()), tmp_path / "f.svg").decode() for _ in range(2)]
    assert (
        pictures[0] == pictures[1]
        and pictures[0].startswith("<?xml")
        and "residual block" in pictures[0]
        and "w4 (W4A4): ours" in pictures[0]
    )


def test_a_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, package, data = (str(place / n) for n in ("w8.onnx", "w8.hawq", "in.npz"))
    assert (
        main(["compare-fake", model, package, "--data", data, "-o", str(tmp_path / "f.svg"), "--limit", "1", "--quiet"])
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "1 runs of 1 image:" in text
        and "equals the reference in every element" in text
        and "float network simulated" not in text
    )
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")


def test_a_network_without_residual_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = models.Graph()
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 3, 5, 5]), 0.05, 128), g.weight([4, 3, 3, 3])), 0.07, 120)
    model, package, data = saved(g.model([models.float_output(y)]), tmp_path, np.zeros((1, 3, 5, 5), np.float32))
    assert (
        main(["compare-fake", str(model), str(package), "--data", str(data), "-o", str(tmp_path / "f.png"), "--quiet"])
        == 0
    )
    assert "no residual blocks: every layer is shown" in capsys.readouterr().out
    found = compare_fake(model, package, data)
    assert (
        not found.residual
        and len(found.blocks) == 2
        and found.to_dict()["blocks_are"] == "layers, as there are no residual sums"
    )


def test_a_package_that_computes_something_else(
    place: Path,
    tmp_path: Path,
    compared: dict[str, Comparison],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = Package.run_layers

    def wrong(self: Package, inputs: Any) -> LayerRun:
        run = honest(self, inputs)
        at = next(i for i, b in enumerate(kernels(self)) if b == blocks[0])
        run.layers[at] = run.layers[at] ^ 1  # type: ignore[operator]
        return run

    blocks = [row.layer for row in compared["w8"].blocks]
    monkeypatch.setattr(Package, "run_layers", wrong)
    model, package, data = (str(place / n) for n in ("w8.onnx", "w8.hawq", "in.npz"))
    assert (
        main(["compare-fake", model, package, "--data", data, "-o", str(tmp_path / "f.png"), "--limit", "1", "--quiet"])
        == 1
    )
    assert "NOT equal to the reference" in capsys.readouterr().out
    found = compare_fake(place / "w8.onnx", place / "w8.hawq", place / "in.npz", limit=1)
    row = found.blocks[0]
    assert not found.exact and row.differing == row.elements and row.curves["ours"][0] > 0 and row.curves["fake"][0] > 0


def refused(place: Path, capsys: pytest.CaptureFixture[str], figure: Path, *argv: str, code: int = 2) -> str:
    assert main(["compare-fake", *argv, "-o", str(figure), "--quiet"]) == code
    assert not figure.exists()
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_refusals(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, package, data, figure = (
        str(place / "w8.onnx"),
        str(place / "w8.hawq"),
        str(place / "in.npz"),
        tmp_path / "f.png",
    )
    assert "in pairs" in refused(place, capsys, figure, model, "--data", data)
    # What cannot be written is found out before anything is read: these are no models.
    no_models = data, data
    assert "ends in .png or .svg" in refused(place, capsys, tmp_path / "f.pdf", *no_models, "--data", data)
    assert "no folder" in refused(place, capsys, tmp_path / "none" / "f.png", *no_models, "--data", data)
    text = refused(place, capsys, figure, model, str(place / "w4.hawq"), "--data", data)
    assert "w4.hawq: is not the package of this model" in text and "w8.onnx" in text
    text = refused(place, capsys, figure, model, package, "--data", data, "--limit", "0")
    assert "--limit 0" in text
    np.savez(tmp_path / "bad.npz", x=np.zeros((1, 3, 9, 9), np.float32))
    assert "has another shape" in refused(place, capsys, figure, model, package, "--data", str(tmp_path / "bad.npz"))
    assert "does not exist" in refused(place, capsys, figure, model, package, "--data", str(tmp_path / "none"))
    # A float model compiles to nothing.
    assert refused(place, capsys, figure, str(place / "net.onnx"), package, "--data", data, code=3)
    assert "is of a quantized model" in refused(
        place, capsys, figure, model, package, "--data", data, "--float", model, code=3
    )
    onnx.save(residual_net(batch=2), str(tmp_path / "two.onnx"))
    assert "takes other inputs" in refused(
        place, capsys, figure, model, package, "--data", data, "--float", str(tmp_path / "two.onnx"), code=3
    )
    monkeypatch.setattr(Package, "on_gpu", True)
    assert "a package for a CPU" in refused(place, capsys, figure, model, package, "--data", data)


def other(seed: int, extra: bool) -> onnx.ModelProto:
    """A float network of the same layers with other weights, or with the same and one layer more."""
    if extra:
        net = residual_net(batch=1)
        net.graph.initializer.append(numpy_helper.from_array(np.ones((5, 5), np.float32), "more"))
        net.graph.node.append(helper.make_node("MatMul", [net.graph.output[0].name, "more"], ["last"], name="more"))
        return net
    net = residual_net(batch=1)
    rng = np.random.default_rng(seed)
    for tensor in net.graph.initializer:
        if len(tensor.dims) > 1:
            tensor.CopyFrom(
                numpy_helper.from_array(rng.standard_normal(tuple(tensor.dims)).astype(np.float32), tensor.name)
            )
    return net


@pytest.mark.parametrize("extra", [False, True])
def test_another_float_network(extra: bool, place: Path) -> None:
    with pytest.raises(ModelError, match="is not the float network of the quantized model"):
        compare_fake(place / "w8.onnx", place / "w8.hawq", place / "in.npz", real=other(5, extra))


def test_names_and_signs_play_no_part(place: Path, compared: dict[str, Comparison]) -> None:
    """Other names of nodes, and a BatchNormalization that multiplies by negative numbers what its layer negates: the
    same network.
    """
    net = residual_net(batch=1)
    constants = {t.name: t for t in net.graph.initializer}
    layers = {n.output[0]: n for n in net.graph.node}
    for norm in [n for n in net.graph.node if n.op_type == "BatchNormalization"]:
        for name in (*layers[norm.input[0]].input[1:], norm.input[1], norm.input[3]):
            constants[name].CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(constants[name]), name))
    for i, node in enumerate(net.graph.node):
        node.name = f"node {i}"
    found = compare_fake(place / "w8.onnx", place / "w8.hawq", place / "in.npz", real=net)
    assert [row.curves["simulated"] for row in found.blocks] == [
        row.curves["simulated"] for row in compared["w8"].blocks
    ]


def test_activations_are_no_residual_sums(tmp_path: Path) -> None:
    """x + x sigmoid(x) adds two functions of one tensor: a table, no block."""
    g = models.Graph()
    x = g.qdq(g.conv(g.qdq(g.input("x", [1, 3, 5, 5]), 0.05, 128), g.weight([4, 3, 3, 3])), 0.07, 120)
    y = g.qdq(g.node("Add", [x, g.node("Mul", [x, g.node("Sigmoid", [x])])]), 0.1, 90)
    found = compare_fake(
        *saved(
            g.model([models.float_output(y)]),
            tmp_path,
            np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype(np.float32),
        )
    )
    assert not found.residual and found.exact


@pytest.mark.slow
def test_an_exported_program(tmp_path: Path) -> None:
    """PT2E's model and its float program, two images at a time; of three one is left."""
    import torch

    net = TorchNet().eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), tmp_path / "net.pt2")
    torch.export.save(pt2e("xnnpack per channel", net, (2, 3, 8, 8)), tmp_path / "q.pt2")
    ht.compile(tmp_path / "q.pt2").save(tmp_path / "q.hawq")
    np.savez(tmp_path / "in.npz", x=images(3))
    found = compare_fake(tmp_path / "q.pt2", tmp_path / "q.hawq", tmp_path / "in.npz", real=tmp_path / "net.pt2")
    (block,) = found.blocks
    assert found.exact and found.runs == 1 and found.precision == "W8A8" and not found.not_matched
    assert block.curves["ours"] == [0] and 0 < block.curves["simulated"][0] < 0.1

"""Post-training quantization: what is written runs in ONNX Runtime, compiles to integers alone, and has the widths
that were asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

import hawq_tvm as ht
from hawq_tvm.bench.packaged import weights
from hawq_tvm.cli import main
from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.ptq.quantizer import Quantized, post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.ptq.widths import kept_small, layer_bits

from .networks import FloatNet, TorchNet, images, residual_net

Array = np.ndarray[Any, Any]
NAMES = ["stem", "a1", "a2", "short", "b1", "b2", "fc"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    onnx.save(residual_net(batch=1), str(folder / "net.onnx"))
    np.savez(folder / "in.npz", x=images(16))
    return folder


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def outputs(model: onnx.ModelProto, x: Array) -> Array:
    ran = session(model)
    return np.concatenate([ran.run(None, {"x": one[None]})[0] for one in x])


def compiled_exactly(model: onnx.ModelProto, x: Array) -> ht.Package:
    """The package of a model, after its layers were compared with the reference on real inputs, and its outputs with
    ONNX Runtime's.
    """
    report = ht.inspect(model)
    assert report.compilable and not report.float_tail, report.verdict
    package = ht.compile(model)
    package.verify([{"x": one[None]} for one in x[:2]], random=1, seed=0).raise_if_mismatch()
    (name,) = (one.name for one in package.outputs)
    ours = np.concatenate([package.run({"x": one[None]})[name] for one in x])
    theirs = outputs(model, x)
    # ONNX Runtime computes layers in float32: a value at a rounding boundary may move by a step, which a net this small
    # shows in its output.
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()
    return package


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in model.graph.initializer}


def noise(model: onnx.ModelProto, found: Quantized) -> float:
    """The squared error of the quantized net's outputs over the float ones' squares, on images it was not calibrated
    on.
    """
    x = images(64, seed=9)
    real, integer = outputs(model, x), outputs(found.model, x)
    return float(((real - integer) ** 2).sum() / (real**2).sum())


# -- what is written
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(4, effort=20),
        Recipe(4, keep_ends=False, symmetric=True, rounding="nearest"),
        Recipe("W4A8", "percentile", equalize="relu", correct_bias=True, rounding="nearest"),
    ],
    ids=["8", "4", "all4", "W4A8"],
)
def test_runs_everywhere(place: Path, recipe: Recipe) -> None:
    net = residual_net(batch=1)
    found = post_training(net, place / "in.npz", recipe)
    assert found.model.ir_version <= 11 and found.model.opset_import[0].version >= 21
    compiled_exactly(found.model, images(3, seed=1))
    assert [row["layer"] for row in found.layers] == NAMES
    assert noise(net, found) < (0.3 if recipe.bits == 4 else 0.02)
    assert not any(n.op_type == "BatchNormalization" for n in found.model.graph.node)


def test_four_bits_are_four_bits(place: Path) -> None:
    recipe = Recipe(4, keep_ends=False, keep_small=False, effort=5)
    made = post_training(residual_net(batch=1), place / "in.npz", recipe).model
    types = types_of(made)
    assert [types[f"{name}_weight_quantized"] for name in NAMES] == [TensorProto.INT4] * 7
    assert types["x_zero_point"] == TensorProto.INT4 and types["fc_bias_quantized"] == TensorProto.INT32
    # The stem's ReLU feeds layers of 4 bits alone, the block's also a sum, which reads 8.
    assert {types[n] for n in types if n.endswith("_zero_point")} == {
        TensorProto.INT4,
        TensorProto.UINT4,
        TensorProto.UINT8,
    }
    with pytest.raises(ModelError, match="is of a quantized model"):
        load_float(made)


@pytest.mark.parametrize(("bits", "kind"), [(2, TensorProto.INT4), (3, TensorProto.INT4), (6, TensorProto.INT8)])
def test_weights_of_any_width(place: Path, bits: int, kind: int) -> None:
    """The next wider type holds them in the file, the kernels store them as they are."""
    net = residual_net(batch=1)
    found = post_training(net, place / "in.npz", Recipe(f"W{bits}A8", keep_small=False, effort=5))
    codes = {t.name: numpy_helper.to_array(t).astype(np.int64) for t in found.model.graph.initializer}
    for row in found.layers[1:-1]:
        own = codes[f"{row['layer']}_weight_quantized"]
        assert types_of(found.model)[f"{row['layer']}_weight_quantized"] == kind and row["weight_bits"] == bits
        assert -(2 ** (bits - 1)) <= own.min() and own.max() < 2 ** (bits - 1)
    held = [
        own.size * row["weight_bits"] for row in found.layers for own in [codes[f"{row['layer']}_weight_quantized"]]
    ]
    assert found.notes["weight_bytes"] == sum(-(-n // 8) for n in held)
    package = compiled_exactly(found.model, images(3, seed=1))
    assert f"{bits}-bit weights" in weights(package.graph)


def test_ends_keep_eight_bits(place: Path) -> None:
    rows = {
        r["layer"]: (r["weight_bits"], r["activation_bits"])
        for r in post_training(residual_net(), place / "in.npz", Recipe(4, keep_small=False, effort=5)).layers
    }
    assert rows["stem"] == rows["fc"] == (8, 8) and {rows[n] for n in NAMES[1:-1]} == {(4, 4)}


def test_small_layers_keep_eight_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two convolutions with groups the one whose channels read one channel each, and the smallest others that have
    a 32nd of the weights together; a file and an option say else.
    """
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Relu", g.conv("x", 4, 3, 3, "stem"))
    y = g.node("Relu", g.conv(y, 8, 4, 3, "depth", group=4))
    y = g.node("Relu", g.conv(y, 4, 8, 1, "grouped", group=2))
    y = g.node("Relu", g.conv(y, 4, 4, 1, "small"))
    y = g.node("Relu", g.conv(y, 32, 4, 3, "many"))
    y = g.node("Relu", g.conv(y, 512, 32, 1, "most"))
    onnx.save(g.model(g.conv(y, 2, 512, 1, "last")), str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "in.npz", x=images(4))
    names = ["stem", "depth", "grouped", "small", "many", "most", "last"]

    def bits(*options: str, small: Sequence[str] = ()) -> dict[str, str]:
        files = [str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "in.npz"), "-o", str(tmp_path / "q.onnx")]
        assert main(["quantize", *files, "--rounding", "nearest", "--json", *options]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["small"] == list(small) and [row["layer"] for row in said["layers"]] == names
        return {row["layer"]: f"W{row['weight_bits']}A{row['activation_bits']}" for row in said["layers"]}

    small = ["depth", "grouped", "small"]
    kept = dict.fromkeys(["stem", *small, "last"], "W8A8")
    for choice in ("W4A8", "W4A4", "W8A4"):
        assert bits("--bits", choice, small=small) == kept | dict.fromkeys(["many", "most"], choice)
        if choice != "W8A4":  # which ONNX Runtime refuses
            onnxruntime.InferenceSession(str(tmp_path / "q.onnx"))
    ends = dict.fromkeys(["stem", "last"], "W8A8")
    assert bits("--bits", "W4A8", "--no-keep-small") == dict.fromkeys(names, "W4A8") | ends
    assert bits("--bits", "8") == dict.fromkeys(names, "W8A8")
    path, layers = tmp_path / "bits.json", {n: {"weight": 4, "activation": 8} for n in names}
    path.write_text(json.dumps({"layers": layers}))
    assert bits("--bits", str(path)) == dict.fromkeys(names, "W4A8")
    files = [str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "in.npz"), "-o", "q.onnx"]
    refused = ["quantize", *files, "--bits", str(path), "--no-keep-small"]
    assert main(refused) == 2 and "--no-keep-small: is for one width for all layers" in capsys.readouterr().err


def test_ends_have_an_option_of_their_own(tmp_path: Path) -> None:
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Relu", g.conv(g.node("Relu", g.conv("x", 3, 3, 3, "first", group=3)), 4, 3, 3, "middle"))
    graph = load_float(g.model(g.conv(y, 4, 4, 3, "last", group=4)))
    assert kept_small(graph, Recipe("W4A8")) == []
    assert layer_bits(graph, Recipe("W4A8", keep_ends=False)) == dict.fromkeys(["first", "middle", "last"], (4, 8))


def test_bits_of_a_file(place: Path, tmp_path: Path) -> None:
    widths = {n: (8, 8) for n in NAMES} | {"a1": (4, 8), "b1": (4, 4)}
    path = tmp_path / "bits.json"
    path.write_text(json.dumps({"layers": {n: {"weight": w, "activation": a} for n, (w, a) in widths.items()}}))
    found = post_training(residual_net(batch=1), place / "in.npz", Recipe(path, effort=5))
    types = types_of(found.model)
    for row in found.layers:
        weight, activation = widths[row["layer"]]
        assert (row["weight_bits"], row["activation_bits"]) == (weight, activation)
        assert types[f"{row['layer']}_weight_quantized"] == (TensorProto.INT4 if weight == 4 else TensorProto.INT8)
    # b1 reads 4 bits of a tensor that the block's sum reads with 8.
    assert types["b1_input_zero_point"] == TensorProto.UINT4
    compiled_exactly(found.model, images(2, seed=2))


def test_grid_of_what_can_be_negative(place: Path) -> None:
    """A 4-bit tensor without a ReLU keeps its negative values (HAWQ's unsigned one clamps them away)."""
    g = FloatNet([1, 3, 8, 8])
    y = g.conv(g.conv("x", 4, 3, 3, "first"), 4, 4, 1, "linear")
    net = g.model(g.conv(g.conv(y, 4, 4, 1, "middle"), 4, 4, 1, "last"))
    found = post_training(net, place / "in.npz", Recipe(4, rounding="nearest"))
    row = next(r for r in found.layers if r["layer"] == "middle")
    assert row["activation_type"] == "int4"
    # Three layers of 4 bits, each with about 1 % of rounding noise in its weights and in its input.
    assert noise(net, found) < 0.1
    compiled_exactly(found.model, images(2, seed=3))


def mobile(kind: str) -> onnx.ModelProto:
    g = FloatNet([1, 3, 8, 8], seed=4)
    top = {"ReLU6": lambda y: g.node("Clip", y, g.constant(0.0), g.constant(6.0)), "ReLU": lambda y: g.node("Relu", y)}
    act = top.get(kind) or (
        lambda y: g.node("Mul", y, g.node("Sigmoid", y)) if kind == "SiLU" else g.node("HardSwish", y)
    )
    y = act(g.norm(g.conv("x", 8, 3, 3, "stem", pads=[1] * 4, strides=[2, 2]), 8))
    z = act(g.norm(g.conv(y, 8, 8, 3, "depth", pads=[1] * 4, group=8), 8))
    y = g.node("Concat", g.norm(g.conv(z, 8, 8, 1, "project"), 8), y, axis=1)
    gate = g.node(
        "Sigmoid", g.conv(act(g.conv(g.node("GlobalAveragePool", y), 4, 16, 1, "squeeze")), 16, 4, 1, "excite")
    )
    y = g.node("MaxPool", g.node("Mul", y, gate), kernel_shape=[2, 2], strides=[2, 2])
    y = g.node("Reshape", g.node("AveragePool", y, kernel_shape=[2, 2]), g.constant([1, -1], np.int64))
    y = g.node("Add", g.node("MatMul", y, g.random(16, 6, scale=0.3)), g.random(6, scale=0.1))
    return g.model(y)


@pytest.mark.parametrize(("kind", "bits"), [("ReLU6", 4), ("SiLU", 4), ("HardSwish", 8), ("ReLU", "W4A8")])
def test_operators_of_mobile_networks(place: Path, kind: str, bits: int | str) -> None:
    net = mobile(kind)
    found = post_training(net, place / "in.npz", Recipe(bits, effort=10))
    compiled_exactly(found.model, images(2, seed=5))
    assert noise(net, found) < (0.3 if bits == 4 else 0.05)
    # A chain of element-wise operators on one tensor is not cut into pieces.
    assert not any("sigmoid" in n and "depth" in n for n in types_of(found.model))


def test_old_opsets_and_programs(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=images(8))
    g = FloatNet([1, 3, 8, 8], opset=11)
    y = g.node("Clip", g.conv("x", 4, 3, 3, "c"), g.constant(0.0), g.constant(6.0), name="")
    net = g.model(g.node("Gemm", g.node("Flatten", y), g.random(144, 3), g.random(3), name="", alpha=0.5, beta=2.0))
    found = post_training(net, tmp_path / "in.npz")
    assert [row["layer"] for row in found.layers] == [layer.name for layer in load_float(net).layers] and noise(
        net, found
    ) < 0.01

    program = torch.export.export(TorchNet().eval(), (torch.randn(1, 3, 8, 8),))
    torch.export.save(program, tmp_path / "net.pt2")
    for model in (program, tmp_path / "net.pt2"):
        found = post_training(model, tmp_path / "in.npz", Recipe(4, effort=5))
        assert (
            [row["layer"] for row in found.layers]
            == [layer.name for layer in load_float(model).layers]
            == ["stem", "deep", "fc"]
        )
    x = images(4, seed=3)
    with torch.no_grad():
        real = np.concatenate([program.module()(torch.from_numpy(one[None])).numpy() for one in x])
    assert np.abs(outputs(found.model, x) - real).max() < 0.3 * np.abs(real).max()
    compiled_exactly(found.model, x[:2])


def test_dead_channels_keep_their_bias(place: Path) -> None:
    """A channel of zeros (as training leaves them) with a bias: its scale is such that the bias fits."""
    g = FloatNet([1, 3, 8, 8])
    weight = g.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight[1] = 0
    y = g.node("Conv", "x", g.constant(weight), g.constant([0.5, -2.0, 1.0, 0.0]), name="c")
    net = g.model(g.conv(y, 2, 4, 1, "d"))
    found = post_training(net, place / "in.npz")
    assert noise(net, found) < 0.01
    compiled_exactly(found.model, images(2, seed=1))


# -- better weights
# -------------------------------------------------------------------------------------------------------


def test_equalisation_changes_no_function(place: Path) -> None:
    from hawq_tvm.quantize.network.prepare import prepare
    from hawq_tvm.quantize.ptq.equalize import equalize

    g = FloatNet([1, 3, 8, 8])
    y = g.node("Relu", g.conv("x", 8, 3, 3, "a", group=1))
    y = g.node("Relu", g.conv(y, 8, 8, 3, "b", group=8))
    y = g.conv(y, 4, 8, 1, "c")
    net = g.model(g.conv(g.node("Clip", y, g.constant(0.0), g.constant(6.0)), 4, 4, 1, "d", group=2))
    net.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(
            onnx.numpy_helper.to_array(net.graph.initializer[0])
            * np.logspace(-3, 1, 8, dtype=np.float32).reshape(8, 1, 1, 1),
            "c0",
        )
    )
    prepared, graph = prepare(net)
    scaled, clips = equalize(prepared, graph, relu6=False)
    assert scaled == ["a", "b"] and not clips
    x = images(4)
    # Float32 sums of rescaled weights, rounded elsewhere.
    np.testing.assert_allclose(outputs(prepared, x), outputs(net, x), rtol=1e-4, atol=1e-5)
    prepared, graph = prepare(net)
    scaled, clips = equalize(prepared, graph, relu6=True)
    assert scaled == ["a", "b", "c"] and len(clips) == 1


def test_equalisation_helps_uneven_channels(place: Path) -> None:
    g = FloatNet([1, 3, 8, 8])
    spread = np.logspace(-2, 1, 8, dtype=np.float32)
    first = g.rng.standard_normal((8, 3, 3, 3)).astype(np.float32) * spread.reshape(8, 1, 1, 1)
    second = g.rng.standard_normal((4, 8, 1, 1)).astype(np.float32) / spread.reshape(1, 8, 1, 1)
    y = g.node("Relu", g.node("Conv", "x", g.constant(first), name="a"))
    net = g.model(g.node("Conv", y, g.constant(second), name="b"))
    plain, even = (post_training(net, place / "in.npz", Recipe(equalize=how)) for how in ("off", "relu"))
    assert noise(net, even) < 0.1 * noise(net, plain)


# -- the command line, and what is refused
# --------------------------------------------------------------------------------


def test_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "q.onnx"
    command = [
        "quantize",
        str(place / "net.onnx"),
        "--calib",
        str(place / "in.npz"),
        "-o",
        str(target),
        "--bits",
        "4",
        "--effort",
        "10",
    ]
    assert main([*command, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["bytes"] == target.stat().st_size and {
        "weight_bits",
        "activation_scale",
        "observer",
        "weight_error",
    } <= set(fields["layers"][1])
    assert [set(row) for row in fields["blocks"]] == [
        {"block", "layers", "error_before", "error_after", "iterations", "seconds"}
    ] * 4
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "W4A4" in shown.out and "blocks were learned, 10 iterations each" in shown.out
    assert "reconstructing blocks" in shown.err and not list(tmp_path.glob("*.npz"))
    assert main(["inspect", str(target)]) == 0


def test_refusals(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "q.onnx"
    bits = tmp_path / "bits.json"

    def refused(
        *options: str, calib: str = str(place / "in.npz"), model: str = str(place / "net.onnx")
    ) -> tuple[int, str]:
        code = main(["quantize", model, "--calib", calib, "-o", str(target), "--quiet", *options])
        assert not target.exists()
        return code, capsys.readouterr().err

    def given(widths: Any) -> tuple[int, str]:
        bits.write_text(json.dumps({"layers": {n: {"weight": 8, "activation": 8} for n in NAMES} | widths}))
        return refused("--bits", str(bits))

    code, text = given({"a11": {"weight": 4, "activation": 4}})
    assert code == 2 and "no weighted layer 'a11'" in text and "did you mean 'a1'" in text
    for width in (5, 16, 0, "4"):
        code, text = given({"a1": {"weight": width, "activation": 8}})
        assert code == 2 and "out of range" in text and "a1" in text
    assert refused("--bits", "5")[0] == refused("--bits", "W4A32")[0] == 2
    assert "does not exist" in refused(calib=str(tmp_path / "none.npz"))[1]
    for arrays, word in (
        ({"x": images(2, 9)}, "shape"),
        ({"x": images(2).astype(np.float64)}, "type"),
        ({"x": images(2)[:0]}, "empty"),
        ({"y": images(2)}, "names"),
        ({"x": images(2) * np.nan}, "NaN"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        code, text = refused(calib=str(tmp_path / "bad.npz"))
        assert code == 2 and word in text
    assert (
        refused("--effort", "0.5")[0]
        == refused("--effort", "much")[0]
        == refused("--percentile", "20", "--observer", "percentile")[0]
        == 2
    )
    assert refused("--bits", str(bits), "--keep-first-last")[0] == 2
    assert (
        "no folder"
        in (
            main(
                [
                    "quantize",
                    str(place / "net.onnx"),
                    "--calib",
                    str(place / "in.npz"),
                    "-o",
                    str(tmp_path / "no/q.onnx"),
                ]
            ),
            capsys.readouterr().err,
        )[1]
    )
    quantized = tmp_path / "done.onnx"
    onnx.save(post_training(residual_net(), place / "in.npz").model, str(quantized))
    code, text = refused(model=str(quantized))
    assert code == 3 and "quantized" in text


def test_what_the_library_refuses(place: Path) -> None:
    g = FloatNet([1, 3, 8, 8])
    with pytest.raises(ModelError, match="no layers with weights"):
        post_training(g.model(g.node("Relu", "x")), place / "in.npz")
    with pytest.raises(UsageError, match="no observer"):
        Recipe(observer="best")
    g = FloatNet([1, 3, 8, 8])
    with pytest.raises(InputError, match="not finite"):
        post_training(g.model(g.node("Log", g.conv("x", 2, 3, 1, "c"))), place / "in.npz")
    with pytest.raises(UsageError, match="float graph"):
        post_training(load_float(residual_net()), place / "in.npz")

"""`--shape` of every verb that reads a float model, batches of -1 too; the shapes that are suggested and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.errors import InputError, ModelError, UsageError
from hawq_tvm.frontend.common.inputs import Declared, bound_inputs, example
from hawq_tvm.frontend.onnx.inputs import declared_shape
from hawq_tvm.quantize.float_graph import load_float
from hawq_tvm.quantize.quantizer import post_training

from .networks import FloatNet, TorchNet


def open_net(batch: Any = -1, height: Any = "", width: Any = "", last: bool = False) -> onnx.ModelProto:
    """A convolution and a mean over the map; of the input's dimensions "" is one without a size or a name."""
    g = FloatNet([1, height, width, 3] if last else [1, 3, height, width])
    x = g.node("Transpose", "x", perm=[0, 3, 1, 2]) if last else "x"
    y = g.node("Relu", g.conv(x, 8, 3, 3, "first", pads=[1] * 4))
    model = g.model(g.node("Gemm", g.node("Flatten", g.node("GlobalAveragePool", y)), g.random(8, 6), name="fc"))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, [batch, height, width, 3] if last else [batch, 3, height, width], strict=True):
        dim.Clear()
        if isinstance(size, int):
            dim.dim_value = size
        elif size:
            dim.dim_param = size
    return model


def dims(model: onnx.ModelProto) -> Any:
    return declared_shape(model.graph.input[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    onnx.save(open_net(), str(folder / "net.onnx"))
    rng = np.random.default_rng(0)
    np.savez(folder / "in.npz", x=rng.standard_normal((6, 3, 12, 20)).astype(np.float32), labels=np.arange(6))
    (folder / "pictures").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    return folder


SHAPE = ["--shape", "x=1x3x12x20"]


def test_every_verb_takes_a_batch_of_minus_one(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, q, package = (
        str(place / "net.onnx"),
        str(place / "in.npz"),
        str(tmp_path / "q.onnx"),
        str(tmp_path / "q.hawq"),
    )
    assert main(["quantize", model, "--calib", data, "-o", q, "--quiet", *SHAPE]) == 0
    assert dims(onnx.load(q)) == [1, 3, 12, 20]
    assert main(["inspect", q]) == main(["inspect", q, *SHAPE]) == 0
    assert main(["compile", q, "-o", package, "--quiet"]) == 0
    assert (
        main(
            [
                "allocate",
                model,
                "--calib",
                data,
                "--budget",
                "size=0.5",
                "--probes",
                "16",
                "-o",
                str(tmp_path / "b.json"),
                "--quiet",
                *SHAPE,
            ]
        )
        == 0
    )
    assert main(["latency", model, "-o", str(tmp_path / "l.json"), "--quiet", *SHAPE]) == 0
    assert json.loads((tmp_path / "l.json").read_text())["batch"] == 1
    options = ["--epochs", "1", "--checked", "1", "--held-out", "0.5", "-o", str(tmp_path / "f.onnx"), "--quiet"]
    assert main(["finetune", model, "--data", data, *options, *SHAPE]) == 0 and dims(
        onnx.load(tmp_path / "f.onnx")
    ) == [1, 3, 12, 20]
    for runs in (model, q, package):
        assert main(["evaluate", runs, "--data", data, "--quiet", *SHAPE]) == 0
        assert (
            main(
                [
                    "evaluate",
                    runs,
                    "--data",
                    str(place / "pictures"),
                    "--mean",
                    "127",
                    "--against",
                    model,
                    "--quiet",
                    *SHAPE,
                ]
            )
            == 0
        )
    # Before it is quantized, its shape is no longer what is wrong with it; pictures need a size, which --shape gives.
    capsys.readouterr()
    assert main(["inspect", model, *SHAPE]) == 3
    assert "a shape that is not fixed" not in capsys.readouterr().out
    assert main(["quantize", model, "--calib", str(place / "pictures"), "--mean", "127", "-o", q, "--quiet"]) == 2
    assert "leaves the size open" in capsys.readouterr().err
    assert (
        main(["quantize", model, "--calib", str(place / "pictures"), "--mean", "127", "-o", q, "--quiet", *SHAPE]) == 0
    )


@pytest.mark.parametrize("verb", ["quantize", "allocate", "latency", "finetune", "evaluate"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("y=1x3x12x20", "is not an input of the model"),
        ("x=1x4x12x20", "contradicts the model"),
        ("x=1x3x12", "wrong number of dimensions"),
        ("x=1x3", "wrong number"),
        ("x", "is not understood"),
        ("x=0x3x12x20", "at least 1"),
    ],
)
def test_shapes_that_do_not_fit(
    verb: str, shape: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"quantize": "--calib", "allocate": "--calib", "latency": "", "finetune": "--data", "evaluate": "--data"}[
        verb
    ]
    options = [data, str(place / "in.npz")] if data else []
    options += ["--budget", "size=0.5"] if verb == "allocate" else []
    options += ["-o", str(tmp_path / "out")] if verb != "evaluate" else []
    assert main([verb, str(place / "net.onnx"), *options, "--quiet", "--shape", shape]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("batch", "height", "width"), [(-1, -1, -1), ("", "", ""), ("n", "h", "w"), ("n", 12, "w"), (2, "", "")]
)
def test_sizes_are_written_as_calibrated(batch: Any, height: Any, width: Any, place: Path) -> None:
    """All but the batch, of which calibration takes as many as it likes."""
    found = post_training(open_net(batch, height, width), place / "in.npz")
    first = batch if (isinstance(batch, int) and batch > 0) or batch == "n" else "?"
    assert dims(found.model) == [first, 3, 12, 20]
    ht.compile(found.model, shapes={} if batch == 2 else {"x": (1, 3, 12, 20)})


def test_data_of_several_sizes(place: Path, tmp_path: Path) -> None:
    for i, size in enumerate((12, 16)):
        np.save(tmp_path / f"{i}.npy", np.zeros((2, 3, size, 20), np.float32))
    with pytest.raises(InputError, match=r"1\.npy: x: has another shape; expected imagesx3x12x20; found 2x3x16x20"):
        post_training(open_net(), tmp_path)


def test_channels_last(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network with channels last calibrates on a folder of pictures, and its suggested shape has them last."""
    onnx.save(open_net("n", "h", "w", last=True), str(tmp_path / "net.onnx"))
    command = [
        "quantize",
        str(tmp_path / "net.onnx"),
        "--calib",
        str(place / "pictures"),
        "--mean",
        "127",
        "--std",
        "64",
        "-o",
        str(tmp_path / "q.onnx"),
        "--quiet",
    ]
    assert main(command) == 2 and "pass --shape x=1x224x224x3" in capsys.readouterr().err
    assert main([*command, "--shape", "x=1x12x20x3"]) == 0 and dims(onnx.load(tmp_path / "q.onnx")) == [1, 12, 20, 3]
    ht.compile(str(tmp_path / "q.onnx"))
    with pytest.raises(ModelError, match="x=1x224x224x3"):
        ht.compile(str(tmp_path / "net.onnx"))


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        (["n", 3, "h", "w"], "1x3x224x224"),
        (["n", "h", "w", 3], "1x224x224x3"),
        (["?", "?", "?", "?"], "1x3x224x224"),
        (None, "1x3x224x224"),
        (["n", 3, 48, "w"], "1x3x48x224"),
        (["n", "c", 32, 32], "1x3x32x32"),
        (["n", 224, "w", 3], "1x224x224x3"),
        (["n", 1, "h", 1], "1x1x224x1"),
        (["n", "h", "w", 16], "1x224x224x16"),
        (["n", 224, 224, 3], "1x224x224x3"),
        ([2, "h", "w", 1], "2x224x224x1"),
        (["n", 64, "h", "w"], "1x64x224x224"),
        (["n", 80, "t"], "1x80x128"),
        (["n", "t"], "1x128"),
        (["n"], "1"),
        (["n", 3, 8, 8], "1x3x8x8"),
        (["n", 3, "d", "h", "w"], "1x3x128x128x128"),
    ],
)
def test_suggested_shapes(known: Any, wanted: str) -> None:
    assert example(known) == wanted


def test_shared_dimensions() -> None:
    given = [Declared("a", "float32", ["n", 3]), Declared("b", "float32", ["n", "m"]), Declared("c", "float32", None)]
    assert [one.dims for one in bound_inputs(given, {"a": (4, 3)})] == [[4, 3], [4, "m"], None]
    assert bound_inputs(given, {}) == given
    with pytest.raises(UsageError, match="'n' a second size"):
        bound_inputs(given, {"a": (4, 3), "b": (5, 1)})


def test_inputs_without_a_shape(place: Path, tmp_path: Path) -> None:
    model = open_net()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(
        ModelError, match="input 'x': has no shape; expected a number of dimensions; remedy: pass --shape x=1x3x224x224"
    ):
        post_training(model, place / "in.npz")
    assert dims(post_training(model, place / "in.npz", shapes={"x": (1, 3, 12, 20)}).model) == [1, 3, 12, 20]
    g = FloatNet([])
    with pytest.raises(ModelError, match="x: is an input without dimensions"):
        post_training(
            g.model(g.node("MatMul", g.node("Reshape", "x", g.constant([1, 1], np.int64)), g.random(1, 4), name="m")),
            place / "in.npz",
        )


def test_programs(tmp_path: Path) -> None:
    """A program's open dimensions are those of its examples, or of --shape."""
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(TorchNet().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    assert dims(post_training(program, tmp_path / "in.npz").model) == [2, 3, 8, 8]
    assert dims(post_training(program, tmp_path / "in.npz", shapes={"x": (1, 3, 8, 8)}).model) == [1, 3, 8, 8]
    assert load_float(program).inputs[0].shape == (None, 3, 8, 8) and load_float(program, {"x": (4, 3, 8, 8)}).inputs[
        0
    ].shape == (4, 3, 8, 8)
    with pytest.raises(UsageError, match="contradicts the model"):
        load_float(program, {"x": (1, 3, 9, 8)})

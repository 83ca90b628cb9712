"""What is refused: one ModelError (or UsageError) that names the layer in the user's words, what was expected and
found, and the remedy.
"""

from __future__ import annotations

import builtins
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import HawqError, ModelError, UsageError
from hawq_tvm.frontend.torch import import_exported, read_program

from .programs import IN_SCALE, Between, Q, Residual, dequantize, export, pt2e, quantize, torch

F = torch.nn.functional
SHAPE = (2, 3, 6, 6)


class Block(torch.nn.Module):  # type: ignore[misc]
    """A function inside a module of its own, so that there is a path to name."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Any) -> Any:
        return self.function(*xs)


class Net(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.stage = torch.nn.Sequential(Block(function))

    def forward(self, x: Any) -> Any:
        return quantize(self.stage(dequantize(quantize(x, 0.05, 100), 0.05, 100)), 0.05, 100)


def refused(source: Any, words: str, kind: type[HawqError] = ModelError, **options: Any) -> HawqError:
    with pytest.raises(kind, match=words) as error:
        ht.compile(source, **options)
    assert str(error.value).count("\n") == 0 and error.value.exit_code == (3 if kind is ModelError else 2)
    return error.value


def program_of(function: Any) -> Any:
    return export(Net(function), SHAPE)


def test_an_unknown_operator_names_its_module() -> None:
    error = refused(program_of(lambda x: torch.cumsum(x, 1)), "aten.cumsum is not supported")
    assert error.where == "stage.0" and error.remedy and "cumsum" in error.found


def test_everything_is_listed_at_once() -> None:
    program = program_of(lambda x: torch.cumsum(torch.sort(x, 1)[0], 1))
    report = ht.inspect(program)
    assert [e["op"] for e in report.unsupported] == ["aten.sort", "aten.cumsum"]
    assert (
        not report.compilable
        and len(report.unsupported) == 2
        and all(e["layer"].startswith("stage.0") for e in report.unsupported)
    )


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1].float(), "is not supported|reads a result"),
        (lambda x: F.adaptive_avg_pool2d(x, 4), "unequal sizes"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "number of its own"),
        (lambda x: torch.div(x, 2.0, rounding_mode="floor"), "rounds its quotient"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "not supported"),
        (lambda x: x.double().float(), "element type"),
        (lambda x: F.dropout(x, 0.5, True), "training mode"),
    ],
    ids=["indices", "adaptive", "divisor", "rounding", "bicubic", "float64", "dropout"],
)
def test_arguments_without_integer_meaning(function: Any, words: str) -> None:
    error = refused(program_of(function), words)
    assert error.where.startswith("stage.0")


def test_what_cannot_be_integer() -> None:
    error = refused(program_of(lambda x: x / (torch.exp(x.mean((2, 3), keepdim=True)) + x)), "cannot be integer")
    assert error.where.startswith("stage.0") and "quantize this tensor too" in error.remedy


def test_a_float_program() -> None:
    error = refused(export(Block(F.relu), SHAPE), "is not quantized")
    assert "hawq-tvm quantize" in error.remedy
    assert ht.inspect(export(Block(F.relu), SHAPE)).error == str(error)


def test_dynamic_quantization() -> None:
    error = refused(pt2e("xnnpack dynamic", Residual(), SHAPE), "at run time")
    assert "statically" in error.remedy


def test_modules_are_not_programs() -> None:
    assert "torch.export.export" in refused(Block(F.relu), "is a module").remedy
    assert refused(torch.export.export(Block(F.relu), (torch.zeros(SHAPE),)).module(), "is a module")


def test_programs_that_change_their_buffers() -> None:
    class Counter(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.count.add_(1)
            return quantize(x + self.count, 0.05, 100)

    assert refused(export(Counter(), SHAPE), "changes a tensor of its own").where == "count"


def test_batch_norm_in_training_mode() -> None:
    class Train(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            y = F.batch_norm(dequantize(quantize(x, 0.05, 100), 0.05, 100), None, None, None, None, True)
            return quantize(y, 0.05, 100)

    assert "eval" in refused(export(Train(), SHAPE), "training mode").remedy


# -- scales, zero points, ranges ------------------------------------------------------------------------------


def _per_tensor(scale: float, zero: int, low: int = 0, high: int = 255, dtype: Any = torch.uint8) -> Any:
    return export(Block(lambda x: Q.quantize_per_tensor(x, scale, zero, low, high, dtype)), SHAPE)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0.0, 0), "not a positive finite"),
        ((-0.1, 0), "not a positive finite"),
        ((float("nan"), 0), "not a positive finite"),
        ((1e-42, 0), "not a positive finite"),
        ((0.5, 256), "zero point out of range"),
        ((0.5, -1), "zero point out of range"),
        ((0.5, 7, 8, 15), "zero point out of range"),
        ((0.5, 0, 0, 300), "do not fit its type"),
        ((0.5, 0, 9, 3), "do not fit its type"),
        ((0.5, 0, -128, 127, torch.int32), "do not fit its type|not supported"),
    ],
)
def test_bad_quantization(arguments: tuple[Any, ...], words: str) -> None:
    assert refused(_per_tensor(*arguments), words).where == "xs_0.quantize"


def test_scales_that_float32_cannot_hold() -> None:
    """PyTorch rounds 1 / s of the float64 s: where float32's s has another reciprocal, (A2) would be another
    function.
    """
    inverse = lambda s: np.float32(1) / np.float32(s) != np.float32(1 / s)  # noqa: E731
    scales = np.random.default_rng(0).uniform(0.01, 1, 100)
    bad, good = next(s for s in scales if inverse(s)), next(s for s in scales if not inverse(s))
    assert "float32" in refused(_per_tensor(float(bad), 3), "float32 cannot hold").remedy
    import_exported(_per_tensor(float(good), 3))


def test_channels_that_do_not_fit() -> None:
    class Channels(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, values: int, zeros: int, high: int = 127) -> None:
            super().__init__()
            self.register_buffer("q", torch.full((4, 3, 1, 1), 100, dtype=torch.int8))
            self.register_buffer("s", torch.full((values,), 0.01))
            self.register_buffer("z", torch.zeros(zeros, dtype=torch.int64))
            self.high = high

        def forward(self, x: Any) -> Any:
            w = Q.dequantize_per_channel(self.q, self.s, self.z, 0, -128, self.high, torch.int8)
            return quantize(F.conv2d(dequantize(quantize(x, 0.05, 100), 0.05, 100), w), 0.05, 100)

    import_exported(export(Channels(4, 4), SHAPE))
    assert refused(export(Channels(4, 4, 7), SHAPE), "outside its range").where == "conv2d.weight"
    # PyTorch itself refuses scales of another length while it exports: such a program can only come from elsewhere.
    program = read_program(export(Channels(4, 4), SHAPE))
    for name in ("b_s", "b_z"):
        constants = {k: v[:3] if k == name else v for k, v in program.constants.items()}
        with pytest.raises(ModelError, match="do not fit"):
            import_exported(replace(program, constants=constants))


# -- inputs and shapes ----------------------------------------------------------------------------------------


def test_shapes() -> None:
    batch = torch.export.Dim("batch", min=2, max=16)
    model = Between(lambda x: F.relu(x).reshape(x.shape[0], -1))
    program = export(model, SHAPE, dynamic_shapes=(({0: batch},),))
    name = import_exported(program, {"xs_0": (4, 3, 6, 6)})["main"].params[0].name
    assert name == "xs_0"
    assert "--shape xs_0=" in refused(program, "not fixed").remedy
    assert "2 to 16" in refused(program, "not exported for", UsageError, shapes={"xs_0": (17, 3, 6, 6)}).expected
    refused(program, "contradicts", UsageError, shapes={"xs_0": (4, 3, 6, 7)})
    refused(program, "not an input", UsageError, shapes={"y": (4, 3, 6, 6)})
    package = ht.compile(program, shapes={"xs_0": (4, 3, 6, 6)})
    x = np.random.default_rng(0).uniform(-2, 2, (4, 3, 6, 6)).astype(np.float32)
    with torch.no_grad():
        (wanted,) = model(torch.tensor(x))
    assert package.run({"xs_0": x})["quantize_per_tensor_1"].shape == (4, 108) == tuple(wanted.shape)


def test_inputs_of_another_type() -> None:
    model = Block(lambda x: quantize(x.float(), IN_SCALE, 3))
    program = torch.export.export(model, (torch.zeros(2, 3, dtype=torch.float64),))
    assert refused(program, "element type").where == "input 'xs_0'"


def test_outputs_keep_their_names() -> None:
    class Two(torch.nn.Module):  # type: ignore[misc]
        def forward(self, image: Any) -> Any:
            y = dequantize(quantize(image, 0.05, 100), 0.05, 100)
            return {"logits": quantize(y, 0.05, 100), "twice": [y * 2, y]}

    main = import_exported(export(Two(), SHAPE))["main"]
    names = [str(n) for n in main.attrs["hawq.output_names"]]
    assert main.params[0].name == "image" and names[0] == "logits" and len(set(names)) == 3


# -- files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    torch.export.save(program_of(F.relu), path)
    return path


def test_content_decides_not_the_name(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "net.onnx"
    other.write_bytes(file.read_bytes())
    assert ht.inspect(other).compilable
    (tmp_path / "net.pt2").write_bytes(b"\x08\x0a")
    refused(tmp_path / "net.pt2", "not an ONNX model|not a readable")


def test_other_archives_of_pytorch(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    assert "checkpoint" in refused(path, "checkpoint").message


def test_damaged_files(file: Path) -> None:
    data = file.read_bytes()
    refused(data[: len(data) // 2], "not a readable|cannot be loaded|not an ONNX")
    broken = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(
                name, content.replace(b"aten.relu", b"nothing.here") if name.endswith("model.json") else content
            )
    refused(broken.getvalue(), "cannot be loaded")


def test_without_pytorch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch" or name.startswith("torch."):
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    error = refused(file, "only PyTorch can read")
    assert "pip install" in error.remedy and error.where == str(file)


def test_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["format"] == "PyTorch exported program" and report["compilable"]
    assert main(["compile", str(file), "-o", str(tmp_path / "net.hawq"), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "net.hawq")]) == 0
    bad = tmp_path / "bad.pt2"
    torch.export.save(program_of(lambda x: torch.cumsum(x, 1)), bad)
    assert main(["compile", str(bad), "-o", str(tmp_path / "bad.hawq"), "--quiet"]) == 3
    assert not (tmp_path / "bad.hawq").exists() and "stage.0" in capsys.readouterr().err
    assert main(["inspect", str(bad)]) == 3
    assert main(["inspect", "--operators", "--json"]) == 0
    assert "aten.conv2d" in capsys.readouterr().out

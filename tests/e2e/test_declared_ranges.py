"""A residual network whose float input nothing bounds, from ONNX and PyTorch: refused, or compiled with its range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import HawqError

from ..models import Graph, float_output

SHAPE = (4, 16)
RANGE = {"x": (-3.0, 2.5)}


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """x + W(quantized LayerNorm(x)), quantized: only the LayerNorm and the sum read x."""
    g = Graph(3)
    x, ones = g.input("x", list(SHAPE)), g.constant(np.ones(SHAPE[1], np.float32), onnx.TensorProto.FLOAT)
    normal = g.node("LayerNormalization", [x, ones], axis=-1)
    y = g.node("MatMul", [g.qdq(normal, 0.03, 128), g.weight([16, 16], axis=1)])
    return g.model([float_output(g.qdq(g.node("Add", [x, y]), 0.05, 117))])


def values(seed: int) -> np.ndarray:
    x = (np.random.default_rng(seed).standard_normal(SHAPE) * 1.5).astype(np.float32)
    x[0, :4] = 1e6, -1e6, 2.5, -3.0
    return x


def test_the_refusal_names_the_input_and_the_option(model: onnx.ModelProto) -> None:
    said = "it reads the float input x, and nothing tells its range.*--range x=LOW:HIGH"
    with pytest.raises(HawqError, match=said) as refused:
        ht.compile(model)
    assert ht.inspect(model).error == str(refused.value)


def test_with_its_range_it_is_integers_alone(model: onnx.ModelProto, tmp_path: Path) -> None:
    assert ht.inspect(model, ranges=RANGE).verdict.startswith("compiles to integers alone")
    package = ht.compile(model, ranges=RANGE)
    package.save(tmp_path / "m.hawq")
    package = ht.load(tmp_path / "m.hawq")
    assert package.inputs[0].saturates == RANGE["x"] and package.manifest["float_tail"] == []
    assert "#define HAWQ_INPUT_0_LEAST (-3.0)" in (tmp_path / "m.hawq" / "model.h").read_text()
    x = values(1)
    package.verify({"x": x}).raise_if_mismatch()
    package.verify(random=1, seed=0).raise_if_mismatch()
    proof = package.prove()
    assert proof.ok and not proof.tir_offenders and max(proof.distances.values()) < 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": np.clip(x, *RANGE["x"])})
    (ours,) = package.run({"x": x}).values()
    assert np.abs(ours - theirs).max() <= 0.05 * 1.001  # one step


def test_the_command_line_says_what_saturates(
    model: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "m.onnx")
    np.savez("in.npz", x=values(2))
    assert main(["inspect", "m.onnx", "--quiet"]) == 3
    assert "declare it with --range x=LOW:HIGH" in capsys.readouterr().out
    assert main(["compile", "m.onnx", "-o", "m.hawq", "--range", "x=-3:2.5", "--quiet"]) == 0
    assert main(["info", "m.hawq"]) == 0
    assert "saturates at -3 and 2.5" in capsys.readouterr().out
    beyond = int(((values(2) < -3) | (values(2) > 2.5)).sum())
    assert beyond >= 2 and main(["run", "m.hawq", "--inputs", "in.npz", "-o", "out.npz"]) == 0
    assert f"x: {beyond} values saturate, beyond -3:2.5" in capsys.readouterr().out
    assert main(["run", "m.hawq", "--inputs", "in.npz", "-o", "out.npz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saturated"] == {"x": beyond}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x=1", "a range is not understood; expected NAME=LOW:HIGH"),
        ("x=-8:a", "a range is not understood"),
        ("=0:1", "a range is not understood"),
        ("x=8:-8", "is no range that an input can saturate at"),
        ("z=0:1", "is not an input of the model; expected x; found z"),
    ],
)
def test_ranges_that_are_refused(
    text: str, said: str, model: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    for command in (["inspect"], ["compile", "-o", str(tmp_path / "m.hawq")]):
        assert main([command[0], str(path), *command[1:], "--range", text, "--quiet"]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "m.hawq").exists()
    assert main(["inspect", str(path), "--range", "x=0:1", "--range", "x=0:2"]) == 2


def test_a_program_of_pytorch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'hawq-tvm[torch]'")
    from ..frontend.torch.programs import IN_SCALE, IN_ZERO, OUT_SCALE, OUT_ZERO, dequantize, export, quantize, weight

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = torch.nn.LayerNorm(SHAPE[1]), weight((16, 16))

        def forward(self, x: Any) -> Any:
            y = dequantize(quantize(self.norm(x), IN_SCALE, IN_ZERO), IN_SCALE, IN_ZERO)
            y = torch.nn.functional.linear(y, self.weight())
            return quantize(x + y, OUT_SCALE, OUT_ZERO)

    program = export(Net(), SHAPE)
    with pytest.raises(HawqError, match=r"it reads the float input x, .*--range x=LOW:HIGH"):
        ht.compile(program)
    package, x = ht.compile(program, ranges=RANGE), values(3)
    package.verify({"x": x}).raise_if_mismatch()
    (ours,) = package.run({"x": x}).values()
    theirs = program.module()(torch.from_numpy(np.clip(x, *RANGE["x"]))).numpy()
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1

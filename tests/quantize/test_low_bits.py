"""The table of low bits counts what `evaluate` counts, and is continued."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.quantize.judge.evaluation import evaluate
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.studies import low_bits
from hawq_tvm.studies.low_bits import FLOAT, NNCF, ONNX_RUNTIME, OURS, markdown, rows

from .networks import images, residual_net

OUTPUTS = 5


@pytest.fixture
def setup(tmp_path: Path) -> dict[str, str]:
    onnx.save(residual_net(), str(tmp_path / "float.onnx"))
    np.savez(tmp_path / "calibration.npz", x=images(16), labels=np.arange(16) % OUTPUTS)
    np.savez(tmp_path / "test.npz", x=images(20, seed=1), labels=np.arange(20) % OUTPUTS)
    return {option: str(tmp_path / name) for option, name in low_bits.FILES.items()}


def test_a_table_counts_what_evaluate_counts_and_is_continued(
    setup: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("W4A8", "W4A4", "mixed, half of W8A8's BOPS"):
        monkeypatch.setitem(OURS, name, Recipe(OURS[name].bits, effort=2))
    names = [FLOAT, *OURS, *ONNX_RUNTIME]
    found = rows(names, setup, tmp_path)
    assert [row["network"] for row in found] == names
    for row, file in zip(found[1:], [low_bits.file_of(n, tmp_path) for n in names[1:]], strict=True):
        said = evaluate(file, setup["data"], against=setup["model"]).to_dict()
        assert {k: row[k] for k in said} == said
    assert found[0]["against"]["flips"] == 0 and not [*tmp_path.glob("*.state.npz"), *tmp_path.glob("*.measured.npz")]
    monkeypatch.setattr(low_bits, "row", lambda *_: pytest.fail("measured again"))
    assert rows(names, setup, tmp_path) == found
    assert len(markdown(found).splitlines()) == 2 + len(names)
    # Another method makes our rows anew, and no one else's.
    again = list[str]()
    monkeypatch.setattr(low_bits, "METHOD", -1)

    def remade(*given: Any) -> dict[str, Any]:
        again.append(given[-1])
        return found[names.index(again[-1])]

    monkeypatch.setattr(low_bits, "row", remade)
    assert len(rows(names, setup, tmp_path)) == len(names) and again == [*OURS]
    np.savez(setup["data"], x=images(20, seed=2), labels=np.arange(20) % OUTPUTS)
    with pytest.raises(UsageError, match="another model or other data"):
        rows([FLOAT], setup, tmp_path)


def test_a_missing_nncf_is_said(
    setup: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(low_bits, "find_spec", lambda name: None)
    assert rows([NNCF], setup, tmp_path) == [] and "NNCF is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--networks", "W3A3"], "W3A3"),
        (["--model", "float.onnx"], "give all three, or none"),
        (["--model", "m", "--calib", "c", "--data", "d", "--pictures", "p"], "leave out --model"),
    ],
)
def test_what_the_command_does_not_know(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["low_bits", *options])
    assert low_bits.main() == 2 and message in capsys.readouterr().err


def test_the_depthwise_network_has_shortcuts_where_shapes_stay() -> None:
    net = low_bits.depthwise().eval()
    held = [part.shortcut for part in net.modules() if isinstance(part, low_bits.Bottleneck)]
    assert held == [True, False, True, False, True]
    with torch.no_grad():
        assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "labels.txt").write_text("".join(f"{i:02d}.png {i % OUTPUTS}\n" for i in range(12)))
    return folder


def exported(path: Path) -> None:
    onnx.save(residual_net(batch=1), str(path))


def test_some_pictures_calibrate_and_the_others_are_answered(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hawq_tvm.studies.demo.export_network", exported)
    monkeypatch.setattr(low_bits, "PIXELS", Preprocess((127.0,), (64.0,)))
    monkeypatch.setattr(low_bits, "PICTURES", 4)
    setup = low_bits.efficientnet(photographs, tmp_path)
    for key, numbers in (("calib", range(0, 12, 3)), ("data", [i for i in range(12) if i % 3])):
        pixels = [np.asarray(Image.open(photographs / f"{i:02d}.png"), np.float32) for i in numbers]
        with np.load(setup[key]) as arrays:
            assert arrays["labels"].tolist() == [i % OUTPUTS for i in numbers]
            # Division by a power of two is exact.
            assert np.array_equal(arrays["x"], (np.stack(pixels).transpose(0, 3, 1, 2) - 127) / 64)
    (row,) = rows([FLOAT], setup, tmp_path)
    assert row["images"] == 8


@pytest.mark.parametrize(
    ("place", "message"),
    [(lambda p: p, "leaves no pictures to answer"), (lambda p: p / "00.png", "no labelled pictures")],
)
def test_pictures_that_do_not_suffice_are_refused(
    photographs: Path, tmp_path: Path, place: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        low_bits.efficientnet(place(photographs), tmp_path)
    assert not (tmp_path / "float.onnx").exists()

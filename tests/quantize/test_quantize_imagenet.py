"""The EfficientNet-Lite0 table in small: a toy network and random pictures; what is kept, continued, compared and
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.ptq.quantizer import Recipe
from hawq_tvm.studies import imagenet
from hawq_tvm.studies.imagenet import FLOAT, ONNX_RUNTIME, Study, markdown, quantized_share

from .networks import residual_net

PICTURES, CALIBRATION, CLASSES = 24, 8, 5
RECIPES = {"W8A8": Recipe("W8A8"), "mixed": Recipe("bops=60%", effort=3), "W4A4": Recipe("W4A4", rounding="nearest")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    onnx.save(residual_net(batch=1), str(folder / "float.onnx"))
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i:02d}.png")
    (folder / "pictures" / "labels.txt").write_text("".join(f"{i:02d}.png {i % CLASSES}\n" for i in range(PICTURES)))
    return folder


def study(place: Path, folder: Path, **options: Any) -> Study:
    given = {
        "pixels": Preprocess((127.0,), (64.0,)),
        "calibration": CALIBRATION,
        "recipes": RECIPES,
        "quiet": True,
        **options,
    }
    return Study(place / "float.onnx", place / "pictures", folder, **given)


def classes(place: Path, file: Path) -> list[int]:
    """What ONNX Runtime says to the pictures that do not calibrate, without this project."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    step = PICTURES // CALIBRATION
    pixels = [
        np.asarray(Image.open(place / "pictures" / f"{i:02d}.png"), np.float32) for i in range(PICTURES) if i % step
    ]
    return [int(session.run(None, {"x": ((p - 127) / 64).transpose(2, 0, 1)[None]})[0].argmax()) for p in pixels]


def test_a_table_counts_what_onnxruntime_says_and_is_continued(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [FLOAT, ONNX_RUNTIME, *RECIPES]
    rows = {row["network"]: row for row in study(place, tmp_path).rows(names)}
    assert list(rows) == names
    real, labels = (
        classes(place, place / "float.onnx"),
        [i % CLASSES for i in range(PICTURES) if i % (PICTURES // CALIBRATION)],
    )
    for name in names:
        said = real if name == FLOAT else classes(place, tmp_path / f"{name.replace(' ', '-').lower()}.onnx")
        row = rows[name]
        assert row["pictures"] == len(real) and row["flips"] == sum(a != b for a, b in zip(said, real, strict=True))
        assert (
            row["right"][0] == sum(a == b for a, b in zip(said, labels, strict=True))
            and row["right"][0] - rows[FLOAT]["right"][0] == row["gained"] - row["lost"]
        )
    assert rows[FLOAT]["flips"] == 0 and rows[FLOAT]["bops"] is None
    assert (
        rows["W8A8"]["bops"] == 1
        and rows[ONNX_RUNTIME]["bops"] == 1
        and rows["W4A4"]["bops"] < rows["mixed"]["bops"] <= 0.6
    )
    chosen = json.loads((tmp_path / "mixed.bits.json").read_text())
    # A ratio of two doubles.
    assert rows["mixed"]["bops"] == pytest.approx(chosen["budgets"][0]["reached"] / chosen["budgets"][0]["limit"] * 0.6)
    monkeypatch.setattr(Study, "_row", lambda *_: pytest.fail("measured again"))
    assert study(place, tmp_path).rows(names) == list(rows.values())
    assert len(markdown(list(rows.values())).splitlines()) == 2 + len(names)
    with pytest.raises(UsageError, match="other settings"):
        study(place, tmp_path, limit=3).rows([FLOAT])


def test_libraries_answer_for_networks_of_ours(place: Path, tmp_path: Path) -> None:
    (row,) = study(place, tmp_path, packages=True, limit=4).rows(["W8A8"])
    assert row["package_bytes"] > row["file_bytes"] and row["pictures"] == 4 and (tmp_path / "w8a8.hawq").is_dir()


def test_a_missing_nncf_is_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    assert study(place, tmp_path).rows([imagenet.NNCF]) == []
    assert "NNCF is not installed" in capsys.readouterr().err


def test_pictures_that_do_not_suffice_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves no pictures"):
        study(place, tmp_path, calibration=PICTURES).rows([FLOAT])
    bare = Study(place / "float.onnx", place / "float.onnx", tmp_path)
    with pytest.raises(InputError, match="no labelled pictures"):
        bare.rows([FLOAT])


def test_only_dequantized_operands_count_as_8_bits() -> None:
    def net(raw: bool) -> onnx.ModelProto:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("Pad", ["d", "pads"], ["p"]),
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
            helper.make_node("Conv", ["x" if raw else "p", "v"], ["y"]),
        ]
        values = {
            "s": np.float32(0.1),
            "z": np.int8(0),
            "w": np.zeros((1, 1, 1, 1), np.int8),
            "pads": np.zeros(8, np.int64),
        }
        tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()]
        put, got = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 2, 2]) for n in ("x", "y"))
        return helper.make_model(helper.make_graph(nodes, "net", [put], [got], tensors))

    assert quantized_share(net(False)) == 1 and quantized_share(net(True)) is None


def test_the_command_refuses_unknown_networks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["imagenet", "--data", str(tmp_path), "--networks", "W5A5"])
    assert imagenet.main() == 2
    assert "W5A5" in capsys.readouterr().err

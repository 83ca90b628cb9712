"""`evaluate`: packages and ONNX models on labelled images in every form, agreement with another model, and what is
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
from PIL import Image

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.quantize.judge.evaluation import evaluate
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe

from .networks import images, residual_net

PIXELS = Preprocess((127.0,), (64.0,))
CLASSES, COUNT = 5, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    net = residual_net(batch=1)
    onnx.save(net, str(folder / "net.onnx"))
    onnx.save(residual_net(batch=4), str(folder / "net4.onnx"))
    np.savez(folder / "in.npz", x=images(16))
    found = post_training(net, folder / "in.npz", Recipe())
    onnx.save(found.model, str(folder / "q.onnx"))
    ht.compile(found.model).save(str(folder / "q.hawq"))
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i:02d}.png")
    return folder


def scores(place: Path) -> np.ndarray[Any, Any]:
    """What the float net says to every picture, by ONNX Runtime and PIL alone."""
    session = onnxruntime.InferenceSession(str(place / "net.onnx"), providers=["CPUExecutionProvider"])
    found = []
    for file in sorted((place / "pictures").iterdir()):
        pixels = (np.asarray(Image.open(file), np.float32) - 127) / 64
        found.append(session.run(None, {"x": pixels.transpose(2, 0, 1)[None]})[0][0])
    return np.stack(found)


def test_every_form_of_labels(place: Path, tmp_path: Path) -> None:
    real = scores(place)
    labels = np.random.default_rng(1).integers(0, CLASSES, COUNT)
    labels[:4] = real.argmax(1)[:4]
    top1 = int((real.argmax(1) == labels).sum())
    names = [f"{i:02d}.png" for i in range(COUNT)]
    text = tmp_path / "list.txt"
    text.write_text("".join(f"{n} {c}\n" for n, c in zip(names, labels, strict=True)))
    table = place / "list.csv"
    table.write_text("".join(f"pictures/{n},{c}\n" for n, c in zip(names, labels, strict=True)))
    for c in range(CLASSES):
        (tmp_path / "folders" / f"class {c}").mkdir(parents=True)
    for n, c in zip(names, labels, strict=True):
        (tmp_path / "folders" / f"class {c}" / n).symlink_to(place / "pictures" / n)
    pixels = np.stack([np.asarray(Image.open(place / "pictures" / n), np.float32).transpose(2, 0, 1) for n in names])
    np.savez(tmp_path / "images.npz", x=(pixels - 127) / 64, labels=labels)
    for options in (
        {"data": place / "pictures", "labels": text},
        {"data": table},
        {"data": tmp_path / "folders"},
        {"data": tmp_path / "images.npz"},
    ):
        for model in ("net.onnx", "net4.onnx"):
            found = evaluate(place / model, preprocess=PIXELS, **options)  # type: ignore[arg-type]
            assert (found.images, found.score.top1, found.score.top5) == (COUNT, top1, COUNT)
    for limit in (1, 5, 100):
        assert (
            evaluate(place / "net4.onnx", tmp_path / "images.npz", limit=limit).images
            == evaluate(place / "net4.onnx", table, preprocess=PIXELS, limit=limit).images
            == min(limit, COUNT)
        )


def test_agreement(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = scores(place)
    package = ht.load(str(place / "q.hawq"))
    session = onnxruntime.InferenceSession(str(place / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == package.inputs[0].name
    found = evaluate(place / "q.hawq", place / "pictures", preprocess=PIXELS, against=place / "net.onnx")
    ours = []
    for file in sorted((place / "pictures").iterdir()):
        pixels = ((np.asarray(Image.open(file), np.float32) - 127) / 64).transpose(2, 0, 1)[None]
        ours.append(next(iter(package.run({"x": pixels}).values()))[0].argmax())
    assert found.flips == int((np.array(ours) != real.argmax(1)).sum()) and found.score.top1 is None
    options = ["--data", str(place / "pictures"), "--mean", "127", "--std", "64", "--quiet"]
    assert main(["evaluate", str(place / "q.onnx"), *options, "--against", str(place / "q.hawq"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (
        fields["images"] == COUNT
        and fields["against"]["agreement"] == 1 - fields["against"]["flips"] / COUNT
        and fields["top1"] is None
    )
    assert main(["evaluate", str(place / "q.hawq"), *options, "--against", str(place / "net.onnx")]) == 0
    assert f"of {COUNT} first answers differ" in capsys.readouterr().out


def test_a_package_may_be_a_single_file(place: Path, tmp_path: Path) -> None:
    packed = tmp_path / "one.hawq"
    assert main(["pack", str(place / "q.hawq"), "-o", str(packed)]) == 0
    found = evaluate(packed, place / "pictures", preprocess=PIXELS, against=place / "q.hawq", limit=8)
    assert found.images == 8 and found.flips == 0


def test_preprocessing(place: Path, tmp_path: Path) -> None:
    """A file of preprocessing says what the options say; every option changes what the model sees."""
    folder = tmp_path / "large"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "p.json").write_text(
        json.dumps({"mean": [127, 126, 125], "std": 64, "resize": 12, "resample": "bicubic", "bgr": True})
    )
    from hawq_tvm.quantize.judge.runners import open_runner
    from hawq_tvm.quantize.network.data import open_data

    inputs = open_runner(place / "net.onnx").inputs
    seen = {
        Preprocess((127.0, 126.0, 125.0), (64.0,), *rest): open_data(
            folder, inputs, Preprocess((127.0, 126.0, 125.0), (64.0,), *rest)
        ).fingerprint
        for rest in ((), (12,), (16,), (12, "bicubic"), (12, "bicubic", True), (12, "nearest"))
    }
    assert len(set(seen.values())) == len(seen)
    picture = Image.open(folder / "0.png").resize((18, 12), Image.Resampling.BICUBIC).crop((5, 2, 13, 10))
    wanted = (
        (np.asarray(picture, np.float32)[:, :, ::-1] - np.array([127, 126, 125], np.float32)) / np.float32(64)
    ).transpose(2, 0, 1)
    first = next(
        open_data(folder, inputs, Preprocess((127.0, 126.0, 125.0), (64.0,), 12, "bicubic", True)).batches(1)
    ).inputs["x"][0]
    np.testing.assert_array_equal(first, wanted)
    options = [
        "evaluate",
        str(place / "net.onnx"),
        "--data",
        str(folder),
        "--against",
        str(place / "q.onnx"),
        "--quiet",
        "--json",
    ]
    assert main([*options, "--preprocess", str(tmp_path / "p.json")]) == 0
    assert main([*options, "--preprocess", str(tmp_path / "p.json"), "--mean", "1"]) == 2
    assert main([*options, "--mean", "127", "--resize", "4"]) == 2
    for bad in (
        {"mean": 1},
        {"mean": 1, "std": 0},
        {"mean": "a", "std": 1},
        {"mean": 1, "std": 1, "size": 3},
        {"mean": 1, "std": 1, "resample": "best"},
        [1],
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        assert main([*options, "--preprocess", str(tmp_path / "bad.json")]) == 2


def test_refusals(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str, model: str = "net.onnx", data: Path = place / "pictures") -> tuple[int, str]:
        return main(
            ["evaluate", str(place / model), "--data", str(data), "--mean", "127", "--std", "64", "--quiet", *options]
        ), capsys.readouterr().err

    code, text = refused()
    assert code == 2 and "holds no labels" in text and "--against" in text
    bad = tmp_path / "labels.txt"
    for content, word in (
        ("00.png one\n", "is no label"),
        ("00.png 1\nlost.png 2\n", "does not exist"),
        ("", "names no images"),
        ("00.png 7\n", "class that the model does not have"),
    ):
        bad.write_text(content)
        code, text = refused("--labels", str(bad))
        assert code == 2 and word in text
    assert (
        refused("--labels", str(tmp_path / "none.txt"))[0]
        == refused(data=tmp_path / "none")[0]
        == refused("--limit", "0")[0]
        == 2
    )
    assert refused(model="none.onnx")[0] == 3 and refused(model="pictures")[0] == 3
    np.savez(tmp_path / "bad.npz", x=images(2, 9), labels=[0, 1])
    assert "shape" in refused(data=tmp_path / "bad.npz")[1]
    other = onnx.load(str(place / "net.onnx"))
    other.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
    other.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16
    onnx.save(other, str(tmp_path / "other.onnx"))
    code, text = refused("--against", str(tmp_path / "other.onnx"))
    assert code == 2 and "takes other arrays" in text
    (tmp_path / "net.pt2").write_bytes(b"")
    assert main(["evaluate", str(tmp_path / "net.pt2"), "--data", str(place / "pictures")]) == 2

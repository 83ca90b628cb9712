"""JSON and lists that users give, deep, huge, of other types or numbers: one sentence and exit code 2, at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from hawq_tvm.cli import main
from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.core.json_files import DEPTH, clipped, number, parse_json, read_json
from hawq_tvm.quantize.judge.evaluation import open_images
from hawq_tvm.quantize.network.data import Calibration, read_labels
from hawq_tvm.quantize.network.float_graph import Input
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.targets.target import parse as parse_target

from .networks import images, residual_net

DEEP = {
    "lists": "[" * 100_000,
    "closed": "[" * 5000 + "]" * 5000,
    "objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "just deep": "[" * 500 + "]" * 500,
}
LONG = "1" * 5000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    onnx.save(residual_net(), str(folder / "net.onnx"))
    np.savez(folder / "in.npz", x=images(4), labels=np.arange(4))
    (folder / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "pictures" / f"{i}.png")
    return folder


def commands(place: Path, file: Path) -> dict[str, list[str]]:
    """Every option that names a JSON file."""
    model, data, out = str(place / "net.onnx"), str(place / "in.npz"), str(file.parent / "out")
    return {
        "quantize --bits": ["quantize", model, "--calib", data, "--bits", str(file), "-o", out],
        "quantize --preprocess": [
            "quantize",
            model,
            "--calib",
            str(place / "pictures"),
            "--preprocess",
            str(file),
            "-o",
            out,
        ],
        "finetune --bits": ["finetune", model, "--data", data, "--bits", str(file), "-o", out],
        "allocate --table": ["allocate", "--table", str(file), "--budget", "size=0.5", "-o", out],
        "allocate --latency": [
            "allocate",
            model,
            "--calib",
            data,
            "--latency",
            str(file),
            "--budget",
            "size=0.5",
            "-o",
            out,
        ],
        "evaluate --preprocess": ["evaluate", model, "--data", str(place / "pictures"), "--preprocess", str(file)],
    }


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()  # whatever was said before, by a fixture or a library, is not this command's
    code, err = main([*command, "--quiet"]), capsys.readouterr().err
    assert code == 2, err
    assert (
        "Traceback" not in err
        and "internal error" not in err
        and len(err) < 1000
        and len(err.strip().splitlines()) == 1
    ), err
    assert not Path(command[-1]).exists() or command[0] == "evaluate"
    return err


@pytest.mark.parametrize(
    "text",
    [*DEEP.values(), f'{{"layers": {LONG}}}', '{"mean": 1', "\0", "[1]", "null", '"' + "x" * 10_000 + '"'],
    ids=[*DEEP, "number", "cut", "null byte", "list", "null", "text"],
)
def test_every_option_refuses(text: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    for command in commands(place, file).values():
        assert "x.json" in refused(command, capsys)


def test_other_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(place, tmp_path / "x.json").values():
        assert "No such file" in refused(command, capsys)
        assert "is no file; expected" in refused(
            [str(tmp_path) if a == str(tmp_path / "x.json") else a for a in command], capsys
        )
        assert "a device or pipe" in refused(
            ["/dev/zero" if a == str(tmp_path / "x.json") else a for a in command], capsys
        )
    with (tmp_path / "x.json").open("wb") as stream:
        stream.truncate(2**40)  # a terabyte, of which nothing is on the disk
    for command in commands(place, tmp_path / "x.json").values():
        assert "is too large" in refused(command, capsys)


def test_depth() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH, "here", "lists") is not None
    for text in ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), '{"a":' * 400 + "1" + "}" * 400):
        with pytest.raises(
            InputError, match=rf"here: is nested too deeply; expected lists; found more than {DEPTH} levels"
        ):
            parse_json(text, "here", "lists")
    with pytest.raises(UsageError, match="is nested too deeply"):
        parse_target('{"kind": "llvm", "keys": ' + "[" * 50_000)
    with pytest.raises(InputError, match="cannot be read"):
        read_json("a\0b", "numbers")


def test_numbers() -> None:
    assert [number(v) for v in (1, 2.5, True, None, "1", float("nan"), float("inf"), 10**400, [1])] == [
        1.0,
        2.5,
        *[None] * 7,
    ]
    assert clipped("x" * 100) == "'" + "x" * 56 + "..." and clipped(3) == "3"


ROW = {"parameters": 10, "macs": 10, "sensitivity": {"W8A8": 0, "W4A8": 1, "W4A4": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": 10**400}, "parameters that are no count"),
        ({"macs": float("inf")}, "macs that are no count"),
        ({"macs": -1}, "no count"),
        ({"macs": True}, "no count"),
        ({"macs": 1.5}, "no count"),
        ({"sensitivity": {"W8A8": 10**400, "W4A8": 1, "W4A4": 2}}, "that is no number"),
        ({"fixed": ["W8A8"]}, "no choice"),
        ({"tie": [1]}, "no text"),
        ({"sensitivity": {"W8A8": float("nan"), "W4A8": 1, "W4A4": 2}}, "that is no number"),
        ({"sensitivity": [1] * 1000}, "lacks a choice"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_tables_of_wrong_numbers(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"layers": {"a": {**ROW, **change}}}))
    assert message in refused(
        ["allocate", "--table", str(tmp_path / "t.json"), "--budget", "size=0.5", "-o", str(tmp_path / "o")], capsys
    )


@pytest.mark.parametrize("value", ["10" * 300, "NaN", "Infinity", "true", '"1"', "[]", "[[1]]", "1e39"])
@pytest.mark.parametrize("field", ["mean", "std", "resize"])
def test_preprocessing_of_wrong_numbers(
    field: str, value: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"mean": "1", "std": "1", "resize": "8", field: value}
    (tmp_path / "p.json").write_text("{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}")
    assert "p.json" in refused(
        [
            "evaluate",
            str(place / "net.onnx"),
            "--data",
            str(place / "pictures"),
            "--preprocess",
            str(tmp_path / "p.json"),
        ],
        capsys,
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--mean", "nan"],
        ["--std", "inf"],
        ["--std", "1e-45"],
        ["--mean", "1e39"],
        ["--std", "0"],
        ["--mean", "1", "--resize", "100000"],
    ],
)
def test_options_of_wrong_numbers(options: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert options[-2] in refused(
        ["evaluate", str(place / "net.onnx"), "--data", str(place / "pictures"), *options], capsys
    )


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [LONG, "1" * 10, "-1", "1.0", "1e3", "٣", "²", "0x1", "cat", "", "1_0"])
@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_labels_that_are_none(label: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"l.{suffix}"
    file.write_text(f"0.png{' ' if suffix == 'txt' else ','}{label}\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"l\.{suffix}, line 1: is no label") as error:
        read_labels(file, tmp_path)
    assert len(str(error.value)) < 1000 and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_the_command_refuses_labels(
    suffix: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"l.{suffix}"
    file.write_text(f"0.png{' ' if suffix == 'txt' else ','}²\n", encoding="utf-8")
    pictures = ["--data", str(place / "pictures"), "--mean", "1", "--labels", str(file)]
    assert f"l.{suffix}, line 1: is no label" in refused(["evaluate", str(place / "net.onnx"), *pictures], capsys)


def test_labels_of_lists(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("\ufeffein Bild.png 3\nПёс 犬.png 0\n\nein Bild.png 3\n", encoding="utf-8")
    assert read_labels(file, tmp_path) == {tmp_path / "ein Bild.png": 3, tmp_path / "Пёс 犬.png": 0}
    file.write_text("a.png 3\na.png 4\n")
    with pytest.raises(InputError, match="line 2: gives a file another class than before; expected 3, as before"):
        read_labels(file, tmp_path)
    with pytest.raises(InputError, match="is no file"):
        read_labels(Path("/dev/zero"), tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(file, tmp_path)


INPUTS = (Input("x", "float32", (None, 3, 8, 8)),)


def test_labels_of_folders(tmp_path: Path) -> None:
    for name in ("007", "12"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    batch = next(open_images(tmp_path, INPUTS, Preprocess((0.0,), (1.0,))).batches(2))
    assert batch.labels is not None and batch.labels.tolist() == [7, 12]
    (tmp_path / ("9" * 200)).mkdir()
    with pytest.raises(
        InputError, match="is a folder whose number is no class; expected class numbers below 1,000,000,000"
    ):
        open_images(tmp_path, INPUTS, Preprocess((0.0,), (1.0,)))


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2**63, 1, 2, 3], np.uint64),
        np.array([10**9, 0, 0, 0]),
        np.array([-1, 0, 0, 0], np.int8),
        np.array([True] * 4),
        np.array(list("abcd")),
        np.zeros((4, 1), int),
    ],
)
def test_labels_of_arrays(labels: np.ndarray, tmp_path: Path) -> None:  # type: ignore[type-arg]
    np.savez(tmp_path / "in.npz", x=images(4), labels=labels)
    with pytest.raises(InputError, match="has labels that do not fit; expected 4 class numbers"):
        Calibration([tmp_path / "in.npz"], INPUTS, None, None, "here")


@pytest.mark.parametrize("verb", ["allocate", "finetune", "evaluate"])
def test_labels_beyond_the_classes(verb: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", x=images(4), labels=np.array([0, 1, 999_999_999, 2]))
    data, more = (
        str(tmp_path / "in.npz"),
        {"allocate": ["--budget", "size=0.5"], "finetune": ["--epochs", "1"], "evaluate": []}[verb],
    )
    command = [
        verb,
        str(place / "net.onnx"),
        "--calib" if verb == "allocate" else "--data",
        data,
        *more,
        *([] if verb == "evaluate" else ["-o", str(tmp_path / "out")]),
    ]
    assert "0 to 4; found 999999999" in refused(command, capsys)

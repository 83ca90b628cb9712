"""Calibration data: what is read, in which batches, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hawq_tvm.errors import InputError, UsageError
from hawq_tvm.quantize.data import open_data
from hawq_tvm.quantize.float_graph import Input
from hawq_tvm.quantize.pictures import Preprocess

from .networks import images

INPUTS = (Input("x", "float32", (None, 3, 8, 8)),)


@pytest.mark.parametrize("layout", ["npz", "npy", "single", "several"])
def test_batches_are_the_same_from_every_layout(layout: str, tmp_path: Path) -> None:
    x, labels = images(7), np.arange(7)
    if layout == "npz":
        np.savez(tmp_path / "in.npz", x=x, labels=labels)
    elif layout == "npy":
        np.save(tmp_path / "a.npy", x)
    elif layout == "single":
        for i, one in enumerate(x):
            np.save(tmp_path / f"{i}.npy", one)
    else:
        np.savez(tmp_path / "1.npz", x=x[:2], labels=labels[:2])
        np.savez(tmp_path / "2.npz", x=x[2:], labels=labels[2:])
    data = open_data(tmp_path / "in.npz" if layout == "npz" else tmp_path, INPUTS)
    assert (data.count, data.has_labels) == (7, layout in ("npz", "several"))
    for size in (1, 3, 7, 9):
        batches = list(data.batches(size))
        assert [b.size for b in batches] == [size] * (7 // size) + ([7 % size] if 7 % size else [])
        assert (np.concatenate([b.inputs["x"] for b in batches]) == x).all()
        if data.has_labels:
            assert (np.concatenate([b.labels for b in batches if b.labels is not None]) == labels).all()
    assert [b.size for b in data.batches(3, fixed=True)] == [3, 3]
    with pytest.raises(InputError, match="fewer images than one batch of the model; expected at least 8; found 7"):
        next(data.batches(8, fixed=True))


def test_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
    flat = Image.fromarray(np.full((9, 8, 3), [255, 0, 127], np.uint8))
    flat.save(tmp_path / "3.png")
    (tmp_path / "labels.txt").write_text("0.png 4\n1.png 0\n2.png 1\n3.png 2\n")
    data = open_data(tmp_path, INPUTS, Preprocess((127.0,), (128.0,)))
    batch = next(data.batches(4))
    assert batch.inputs["x"].shape == (4, 3, 8, 8) and batch.labels is not None and batch.labels.tolist() == [4, 0, 1, 2]
    assert (batch.inputs["x"][3] == np.array([1, -127 / 128, 0], np.float32).reshape(3, 1, 1)).all()
    with pytest.raises(UsageError, match=r"--mean and --std"):
        open_data(tmp_path, INPUTS)
    with pytest.raises(UsageError, match=r"--std: has as many numbers as channels"):
        open_data(tmp_path, INPUTS, Preprocess((1.0,), (1.0, 2.0)))
    with pytest.raises(InputError, match=r"0\.png: is a picture, which this model does not take"):
        open_data(tmp_path, (Input("x", "float32", (None, 5)),), Preprocess((0,), (1,)))
    (tmp_path / "labels.txt").write_text("0.png 4\n")
    with pytest.raises(InputError, match=r"1\.png: has no label"):
        open_data(tmp_path, INPUTS, Preprocess((0,), (1,)))
    (tmp_path / "labels.txt").write_text("0.png cat\n")
    with pytest.raises(InputError, match=r"labels\.txt, line 1: is no label"):
        open_data(tmp_path, INPUTS, Preprocess((0,), (1,)))
    (tmp_path / "labels.txt").unlink()
    (tmp_path / "4.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"4\.png: is not a readable picture"):
        open_data(tmp_path, INPUTS, Preprocess((0,), (1,)))


GOOD = images(4)
NAN = GOOD.copy()
NAN[1, 0, 0, 0] = np.nan


@pytest.mark.parametrize(("arrays", "message"), [
    ({"x": GOOD.astype(np.float64)}, r"in\.npz: x: has another type; expected float32; found float64"),
    ({"x": GOOD[:, :, :7]}, r"another shape; expected imagesx3x8x8; found 4x3x7x8"), ({"x": GOOD[0, 0]}, "another shape"),
    ({"x": GOOD[:0]}, "is empty"), ({"x": NAN}, "holds NaN or infinity; found 1 such values"), ({"y": GOOD}, "arrays of other names; expected x"),
    ({"x": GOOD, "labels": np.arange(3)}, "labels that do not fit; expected 4 class numbers; found int64 3"),
    ({"x": GOOD, "labels": np.ones(4)}, "labels that do not fit"),
    ({"x": GOOD, "labels": -np.arange(4)}, "labels that do not fit.*from -3 to 0"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_wrong_arrays(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_data(tmp_path / "in.npz", INPUTS)


def test_wrong_places(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no data")):
        with pytest.raises(InputError, match=message):
            open_data(path, INPUTS)
    (tmp_path / "a.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a\.npy: cannot be read"):
        open_data(tmp_path, INPUTS)
    with pytest.raises(InputError, match="is no calibration data"):
        open_data(tmp_path / "a.npy", INPUTS)
    with pytest.raises(InputError, match="do not say for which input"):
        open_data(tmp_path, (*INPUTS, Input("y", "float32", (None, 1))))
    (tmp_path / "a.npy").unlink()
    np.savez(tmp_path / "1.npz", x=GOOD, labels=np.arange(4))
    np.savez(tmp_path / "2.npz", x=GOOD)
    with pytest.raises(InputError, match=r"2\.npz: has no labels, but other files have"):
        open_data(tmp_path, INPUTS)

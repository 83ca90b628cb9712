"""Files of PyTorch that hold code: it never runs, unless the user vouches for the file."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.errors import InputError, ModelError
from hawq_tvm.files import load_npz

from ..frontend.torch.programs import dequantize, export, quantize, torch

SHAPE = (2, 3, 6, 6)


class Evil:
    """What leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class Net(torch.nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return quantize(torch.relu(dequantize(quantize(x, 0.05, 100), 0.05, 100)), 0.05, 100)


def program(dynamic: bool = False) -> dict[str, bytes]:
    """The files of a .pt2 archive, by their names without the archive's own."""
    stream = io.BytesIO()
    sizes = ({0: torch.export.Dim("n", min=1, max=8), 2: torch.export.Dim("h", min=2)},) if dynamic else None
    made = torch.export.export(Net(), (torch.zeros(SHAPE),), dynamic_shapes=sizes) if dynamic else export(Net(), SHAPE)
    torch.export.save(made, stream)
    with zipfile.ZipFile(stream) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


def written(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def place(files: dict[str, bytes], end: str) -> str:
    return next(n for n in files if n.endswith(end))


def pickled(mark: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(((Evil(mark),), {}), stream)
    return stream.getvalue()


def edited(files: dict[str, bytes], old: str, new: str) -> None:
    name = place(files, "models/model.json")
    text = files[name].decode()
    assert old in text
    files[name] = text.replace(old, new).encode()


def hostile(kind: str, mark: Path) -> dict[str, bytes]:
    files = program(dynamic=kind in ("size", "guard"))
    constants = place(files, "constants/model_constants_config.json")
    folder = constants.rpartition("/")[0]
    code = f"__import__('os').mkdir('{mark}')"
    if kind == "inputs":
        files[place(files, "sample_inputs/model.pt")] = pickled(mark)
    elif kind == "weights":
        name = place(files, "weights/model_weights_config.json")
        meta = {"path_name": "weight_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        files[name] = json.dumps({"config": {"w": meta}}).encode()
        files[name.rpartition("/")[0] + "/weight_0"] = pickled(mark)
    elif kind == "object":
        meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        files[constants] = json.dumps({"config": {"c": meta}}).encode()
        files[f"{folder}/opaque_obj_0"] = pickle.dumps(Evil(mark))
    elif kind == "size":
        edited(files, "Symbol('s", f"{code} or Symbol('s")
    elif kind == "guard":
        edited(files, '"guards_code": []', f'"guards_code": [{json.dumps(code)}]')
    elif kind == "container":
        spec = json.dumps([1, {"type": "collections.defaultdict", "context": {"default_factory_module": "this", "default_factory_name": "s", "dict_context": []}, "children_spec": []}])
        edited(files, '"out_spec": "', f'"out_spec": {json.dumps(spec)}, "was": "')
    elif kind == "target":
        edited(files, '"torch.ops.aten.relu.default"', '"torch.os.getcwd"')
    elif kind == "library":
        files[constants.partition("/")[0] + "/data/aotinductor/model/model.so"] = b"\x7fELF"
    return files


@pytest.mark.parametrize("kind", ["inputs", "weights", "object", "size", "guard", "container", "target", "library"])
def test_code_in_a_program_does_not_run(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark, path = tmp_path / "mark", written(tmp_path / "m.pt2", hostile(kind, tmp_path / "mark"))
    for run in (lambda: ht.inspect(path), lambda: ht.compile(path), lambda: ht.compile(path.read_bytes())):
        with pytest.raises(ModelError, match="--trust"):
            run()
    for argv in (["inspect"], ["compile", "-o", str(tmp_path / "p")], ["quantize", "--calib", str(path), "-o", str(tmp_path / "q.onnx")], ["allocate", "--calib", str(path), "--budget", "bops=0.5", "-o", str(tmp_path / "b.json")]):
        assert main([argv[0], str(path), *argv[1:]]) != 0
    err = capfd.readouterr().err
    assert "Traceback" not in err and "--trust" in err and not mark.exists() and not (tmp_path / "p").exists()


def test_who_trusts_a_file_lets_it_run(tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt2", hostile("inputs", tmp_path / "mark"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ht.inspect(path, trust=True)
    assert (tmp_path / "mark").is_dir()
    with pytest.raises(ModelError, match="--trust"):
        ht.inspect(path)


@pytest.mark.parametrize("dynamic", [False, True])
def test_programs_without_code_need_no_trust(dynamic: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt2", program(dynamic))
    shapes = {"x": SHAPE}
    assert ht.inspect(path, shapes).compilable and ht.inspect(path.read_bytes(), shapes).compilable and ht.inspect(path, shapes, trust=True).compilable
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_two_files_of_one_name(tmp_path: Path) -> None:
    files = program()
    path = written(tmp_path / "m.pt2", files)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(place(files, "sample_inputs/model.pt"), pickled(tmp_path / "mark"))
    with pytest.raises(ModelError, match="two files of one name"):
        ht.inspect(path)
    assert not (tmp_path / "mark").exists()


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "quantized_checkpoint.pth.tar"
    torch.save({"weight_integer": {"a.weight_integer": Evil(tmp_path / "mark")}}, path)
    for run in (ht.inspect, ht.compile):
        with pytest.raises(ModelError, match=r"pickled code.*--trust"):
            run(path)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(ModelError):
        ht.inspect(path, trust=True)
    assert (tmp_path / "mark").is_dir()


def test_tensors_without_values(tmp_path: Path) -> None:
    path = tmp_path / "quantized_checkpoint.pth.tar"
    torch.save({"weight_integer": {"a.weight_integer": torch.zeros(3, device="meta")}}, path)
    with pytest.raises(ModelError, match=r"a\.weight_integer: is no plain tensor.*device meta"):
        ht.inspect(path)


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([Evil(tmp_path / "mark")], object))
    with pytest.raises(InputError):
        load_npz(tmp_path / "in.npz")
    assert not (tmp_path / "mark").exists()

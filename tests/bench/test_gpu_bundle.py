"""The GPU bundle without a GPU: made for this CPU, run by a Python that has NumPy and tvm-ffi only, damaged, too
large.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm_ffi

from deploy.gpu_check import layers
from deploy.gpu_check.bundle import MANIFEST, Bundle, packed
from deploy.machine import vm
from deploy.machine.refusal import Refusal
from hawq_tvm.bench.gpu import gpu_bundle, gpu_cases, gpu_entries
from hawq_tvm.compiler.cuda import runtime
from hawq_tvm.compiler.pipeline import compile_model
from hawq_tvm.core.errors import HawqError, OutputError, PackageError
from hawq_tvm.targets import target as targets

from ..models import Graph, float_output


def network(batch: Any = 3, channels: int = 64) -> onnx.ModelProto:
    """Convolutions with a constant that is large enough to lie outside the library, a residual addition, and a
    product.
    """
    g = Graph(3)
    x = g.qdq(g.input("input", [batch, 3, 8, 8]), 0.0136, 128)
    y = g.qdq(g.node("Relu", [g.conv(x, g.weight([channels, 3, 3, 3]), pads=[1, 1, 1, 1])]), 0.02)
    z = g.qdq(g.conv(y, g.weight([channels, channels, 3, 3]), pads=[1, 1, 1, 1]), 0.11, 128)
    r = g.qdq(g.node("Add", [z, y]), 0.12, 100)
    f = g.node("Flatten", [g.qdq(g.node("GlobalAveragePool", [r]), 0.05, 100)])
    return g.model([float_output(g.qdq(g.node("Gemm", [f, g.weight([10, channels])], transB=1), 0.2, 128))])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tvm-ffi of this Python, as its wheel would unpack."""
    path, root = tmp_path_factory.mktemp("wheel") / "apache_tvm_ffi-this-Python.whl", Path(tvm_ffi.__file__).parent
    with zipfile.ZipFile(path, "w") as archive:
        for p in sorted(root.rglob("*")):
            if p.suffix == ".py" or p.suffix == ".so":
                archive.write(p, Path("tvm_ffi") / p.relative_to(root))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Path]:
    """A bundle of one tiny network for this CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_cases, "CASES", {"tiny": network})
        wanted = gpu_bundle.plan([], [], [])
        assert [w.name for w in wanted] == ["case-tiny"]
        said: list[str] = []
        sizes = gpu_bundle.make(folder / "bundle", folder / "work", wanted, "host", wheel=wheel, say=said.append)
        assert said[0] == "compiling case-tiny"
        assert (
            sum(p.stat().st_size for p in (folder / "bundle").rglob("*") if p.is_file()) < 8e6
            and sum(sizes.values()) < 8e6
        )
        said.clear()
        # Made already, and it replaces itself.
        gpu_bundle.make(folder / "bundle", folder / "work", wanted, "host", wheel=wheel, say=said.append)
        assert said == ["1 of 1: case-tiny"]
        with pytest.raises(OutputError, match="larger than its limit"):
            gpu_bundle.make(folder / "small", folder / "work", wanted, "host", wheel=wheel, limit=1e5)
        assert not (folder / "small").exists()
    yield folder / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "bundle")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which Python finds NumPy and what tvm-ffi needs, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    site = Path(np.__file__).parent.parent
    for name in ("numpy", "numpy.libs", "typing_extensions.py"):
        if (site / name).exists():
            (folder / name).symlink_to(site / name)
    return folder


def check(clean: Path, bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(clean)}
    return subprocess.run(
        [sys.executable, "-S", str(bundle / "gpu_check.py"), *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=bundle.parent,
    )


def reseal(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file of a bundle and its hash."""
    (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_the_manifest_lists_every_file(made: Path) -> None:
    manifest = json.loads((made / MANIFEST).read_text())
    present = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    assert present == {MANIFEST, *manifest["files"]}
    for name, known in manifest["files"].items():
        data = (made / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (known["sha256"], known["bytes"])
    assert manifest["entries"] == [
        {"name": "case-tiny", "net": "", "precision": "tiny", "size": 0, "batch": 3, "verifiable": True}
    ]
    assert [n for n in manifest["files"] if n.startswith("constants/")]


def test_exact_without_tvm(clean: Path, made: Path, tmp_path: Path) -> None:
    assert subprocess.run(
        [sys.executable, "-S", "-c", "import tvm"], capture_output=True, env={**os.environ, "PYTHONPATH": str(clean)}
    ).returncode
    done = check(clean, made, "--device", "cpu", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    row = report["verify"]["case-tiny"]
    assert (
        row["ok"]
        and row["layers"] >= 6
        and row["elements"] > 3 * 64 * 8 * 8
        and report["left_out"] == []
        and report["failed"] == {}
    )
    assert "exact: 1 libraries" in done.stdout
    again = check(clean, made, "--device", "cpu", "--out", str(tmp_path / "out.json"), "--resume")
    assert again.returncode == 0 and "verify case-tiny:" not in again.stdout


def test_a_difference_is_named_to_the_element(clean: Path, bundle: Path) -> None:
    name = "expected/case-tiny.json.xz"
    wanted = json.loads(lzma.decompress((bundle / name).read_bytes()))
    result = wanted[2][0]
    values = np.frombuffer(base64.b64decode(result["values"]), result["dtype"]).reshape(3, *result["shape"]).copy()
    values[(1, *(0,) * (values.ndim - 2), 5)] ^= 1
    result["values"] = base64.b64encode(values.tobytes()).decode()
    reseal(bundle, name, packed(json.dumps(wanted).encode()))
    done = check(clean, bundle, "--device", "cpu")
    assert done.returncode == 1
    assert (
        f"(3 of {len(wanted)}): sample 1, index {[0] * (values.ndim - 2) + [5]}: expected" in done.stdout
        and f"1 of {values[0].size} elements differ" in done.stdout
    )


def test_dense_weights_fill_the_same_places(made: Path) -> None:
    bundle = Bundle(made)
    true, dense = bundle.library("case-tiny"), bundle.library("case-tiny", dense=True)
    holes = bundle.entry("case-tiny")["holes"]
    assert len(true) == len(dense) and holes
    rest_true, rest_dense = bytearray(true), bytearray(dense)
    for h in holes:
        place = slice(h["offset"], h["offset"] + h["count"])
        assert hashlib.sha256(true[place]).hexdigest() == h["sha256"] != hashlib.sha256(dense[place]).hexdigest()
        rest_true[place] = rest_dense[place] = b""[:0].ljust(h["count"], b"\0")
    assert rest_true == rest_dense


def test_without_a_gpu_it_says_so(clean: Path, made: Path, tmp_path: Path) -> None:
    if runtime.driver() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    done = check(clean, made, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 3 and done.stderr.strip().splitlines() == [
        "gpu-check: no NVIDIA driver is installed here: run it on a machine with an NVIDIA GPU"
    ]
    assert not (tmp_path / "out.json").exists()


def test_make_gpu_check_is_the_same_command(made: Path) -> None:
    root = gpu_bundle.DEPLOY.parent
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "OUT=here.json", "OPTIONS=--resume"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().splitlines()[-1] == "python3 gpu-bundle/gpu_check.py --out here.json --resume"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("libraries/case-tiny.so.xz", "does not match its checksum"),
        ("deploy/machine/vm.py", "does not match its checksum"),
        (MANIFEST, "it is no JSON"),
    ],
)
def test_a_damaged_bundle_is_refused(bundle: Path, name: str, sentence: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (bundle / name).write_bytes(data)
    with pytest.raises(Refusal, match=sentence) as e:
        Bundle(bundle)
    assert e.value.exit_code == 3


def test_a_bundle_without_a_file_is_refused(clean: Path, bundle: Path) -> None:
    (bundle / "entries/case-tiny.json.xz").unlink()
    done = check(clean, bundle, "--device", "cpu")
    assert (
        done.returncode == 3
        and "entries/case-tiny.json.xz is missing" in done.stderr
        and "\n" not in done.stderr.strip()
    )


def test_wrong_options_are_refused(clean: Path, made: Path, bundle: Path, tmp_path: Path) -> None:
    assert check(clean, made, "--device", "cpu", "--out", str(tmp_path / "no" / "out.json")).returncode == 2
    (tmp_path / "other.json").write_text("{}")
    done = check(clean, made, "--device", "cpu", "--out", str(tmp_path / "other.json"), "--resume")
    assert done.returncode == 2 and "of another bundle or another machine" in done.stderr
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["targets"]["kind"] = "cuda"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    done = check(clean, bundle, "--device", "cpu")
    assert done.returncode == 2 and "--device is cpu" in done.stderr


def test_larger_batches_repeat_the_images() -> None:
    """A library of batch 5 is checked with what the reference says of two images one by one, large results by their
    hashes.
    """
    target, model = targets.parse("host"), network("n", 72)
    one = compile_model(model, target, shapes={"input": (1, 3, 8, 8)})
    expected = gpu_entries.expected_layers(one.packed, (1, 2), False)
    assert {("values" in r) for s in expected for r in s["results"]} == {True, False}
    five = compile_model(model, target, shapes={"input": (5, 3, 8, 8)})
    entry = gpu_entries.make(five, (1, 2), expected, name="five")
    fields = {
        **entry.fields,
        "layers": [{**row, "results": s["results"]} for row, s in zip(entry.fields["layers"], expected)],
    }
    library = bytearray(entry.library)
    for h in fields["holes"]:
        library[h["offset"] : h["offset"] + h["count"]] = entry.constants[h["sha256"]]
    machine = vm.Machine(tvm_ffi, bytes(library), on_gpu=False)
    assert layers.verify(machine, fields)["ok"]
    last = next(s for s in reversed(fields["layers"]) if "sha256" in s["results"][0])
    last["results"][0]["sha256"][1] = "0" * 64
    found = layers.verify(machine, fields)
    assert (
        not found["ok"]
        and f"layer {last['layer']}" in found["first_difference"]
        and "sample 1, its SHA-256" in found["first_difference"]
    )
    with pytest.raises(PackageError, match="the layers are not those"):
        gpu_entries.make(five, (1, 2), expected[:-1], name="five")


def test_what_does_not_fit_can_only_be_timed(tmp_path: Path) -> None:
    wanted = [gpu_bundle.Wanted(n, "net", "w8a8", 8, 1, (1,), False, i) for i, n in enumerate(("first", "second"))]
    (tmp_path / "constants").mkdir()
    folders = []
    for w in wanted:
        folder = tmp_path / w.name
        folder.mkdir()
        for name in ("library.so.xz", "entry.json.xz", "expected.json.xz"):
            (folder / name).write_bytes(bytes(100))
        (tmp_path / "constants" / f"{w.name}.xz").write_bytes(bytes(1000))
        (folder / "constants.json").write_text(json.dumps([w.name]))
        folders.append(folder)
    files, without = gpu_bundle.choose(wanted, folders, tmp_path / "constants", 2000)
    assert without == ["second"] and "constants/first.xz" in files and "constants/second.xz" not in files
    assert gpu_bundle.choose(wanted, folders, tmp_path / "constants", 5000)[1] == []
    with pytest.raises(OutputError, match=r"larger than its limit.*without any weights"):
        gpu_bundle.choose(wanted, folders, tmp_path / "constants", 300)


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(OutputError, match="exists and is not a bundle"):
        gpu_bundle.write(tmp_path / "mine", {}, {})
    assert (tmp_path / "mine" / "file").read_text() == "x"


def test_a_missing_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HawqError, match="does not exist"):
        gpu_bundle.runtime_files(tmp_path, tmp_path / "no.whl")


def test_the_plan_has_every_form_network_and_batch() -> None:
    wanted = gpu_bundle.plan(gpu_bundle.NETS, list(gpu_bundle.PRECISIONS), gpu_bundle.BATCHES)
    assert len({w.name for w in wanted}) == len(wanted) == len(gpu_cases.CASES) + 4 * 3 * 4 + 2 * 3
    assert [w.rank for w in wanted] == sorted(w.rank for w in wanted)
    assert {f"case-form-{f}" for f in gpu_cases.FORMS} <= {w.name for w in wanted}


def test_the_odd_shapes_reach_every_form_of_the_tensor_core_rule() -> None:
    from schedules.spelling.mma_intrinsics import Form

    assert {f.name.lower() for f in Form} == set(gpu_cases.FORMS)

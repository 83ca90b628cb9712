"""The command line as a user meets it: output, JSON, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hawq_tvm.cli import main, show
from hawq_tvm.core.arrays import checked
from hawq_tvm.core.errors import InputError
from hawq_tvm.core.tensors import TensorSpec
from hawq_tvm.verify.records import inputs_text

from ..models import Graph, float_output, residual_net


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.onnx"
    onnx.save(residual_net(), str(path))
    return path


@pytest.fixture(scope="module")
def package(model: Path) -> Path:
    path = model.parent / "tiny.hawq"
    assert main(["compile", str(model), "-o", str(path), "--quiet"]) == 0
    return path


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    assert "compiles to integers alone" in capsys.readouterr().out
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compilable"] is True


def test_inspect_lists_the_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--operators", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert (
        {"Conv", "Softmax"} <= set(known["ai.onnx"])
        and "QGemm" in known["com.microsoft"]
        and "Range" in known["ai.onnx, on constants only"]
    )
    assert main(["inspect", "--operators"]) == 0
    assert "QLinearConcat" in capsys.readouterr().out
    assert main(["inspect"]) == main(["inspect", "m.onnx", "--operators"]) == 2


def test_inspect_names_what_stays_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    y = g.qdq(g.node("Sigmoid", [g.input("x", [1, 3, 4, 4])]), 0.1, 3)
    path = tmp_path / "float.onnx"
    onnx.save(g.model([float_output(g.qdq(g.conv(y, g.weight([2, 3, 1, 1])), 0.1))]), str(path))
    assert main(["inspect", str(path), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    (layer,) = report["float_layers"]
    assert (
        layer["op"] == "sigmoid"
        and layer["layer"].startswith("sigmoid_")
        and layer["remedy"].startswith("keep it outside the integer region with --allow-float-tail")
    )
    assert main(["compile", str(path), "-o", str(tmp_path / "p.hawq"), "--quiet"]) == 3
    captured = capsys.readouterr()
    assert "sigmoid_" in captured.err and "remedy" in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "p.hawq").exists()


def test_inspect_predicts_the_float_tail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 3, 4, 4]), 0.1, 3), g.weight([2, 3, 1, 1])), 0.1)
    y = g.node("Gemm", [g.node("Flatten", [y]), g.constant(np.ones((32, 5)), onnx.TensorProto.FLOAT)])
    path = tmp_path / "tail.onnx"
    onnx.save(g.model([float_output(y)]), str(path))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "compiles to integers alone" in text
    assert ".acc" not in text and "3 x" not in text and "1 x DequantizeLinear weight: int8 per channel" in text
    assert main(["inspect", str(path), "--allow-float-tail", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["float_tail"] == [y] and report["verdict"].endswith(f"FLOAT outside the integer region: {y}")
    assert main(["compile", str(path), "-o", str(tmp_path / "p.hawq"), "--quiet", "--allow-float-tail"]) == 0


def test_compile_prints_its_proof(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(model), "-o", str(tmp_path / "p.hawq")]) == 0
    captured = capsys.readouterr()
    assert (
        "integer-only" in captured.out
        and "no accumulator can overflow: at least" in captured.out
        and "lower_to_integer" in captured.err
    )
    assert main(["compile", str(model), "-o", str(tmp_path / "q.hawq"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["integer_only"]
        and summary["differing_thresholds"] == 0
        and sum(summary["kernels_by_rule"].values()) > 3
    )


def test_run_verify_prove_bench_info(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tmp_path / "in.npz"
    np.savez(inputs, x=np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32))
    assert main(["run", str(package), "--inputs", str(inputs), "-o", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as out:
        assert [v.shape for v in out.values()] == [(2, 10)]
    capsys.readouterr()
    assert main(["verify", str(package), "--inputs", str(inputs), "--random", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["verify", str(package)]) == 0
    assert "bit-exact:" in capsys.readouterr().out
    assert main(["prove", str(package), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert (
        main(
            [
                "bench",
                str(package),
                "--duration",
                "0",
                "--iterations",
                "3",
                "--warmup-ms",
                "0",
                "--threads",
                "1",
                "--json",
                str(tmp_path / "b.json"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("min", "median", "mean", "p90", "p95", "p99", "throughput"))
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["iterations"] == 3 and report["threads"] == 1 and report["machine"]["cpu"]
    assert main(["info", str(package)]) == 0
    assert "cpu." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["inspect", "missing.onnx"], 3),
        (["compile", "missing.onnx", "-o", "p"], 3),
        (["run", "missing.hawq", "--inputs", "x", "-o", "y"], 3),
        (["verify", "missing.hawq"], 3),
        (["prove", "missing.hawq"], 3),
        (["bench", "missing.hawq"], 3),
        (["info", "missing.hawq"], 3),
    ],
)
def test_missing_files(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "missing" in captured.err and "Traceback" not in captured.err and len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "MODEL", "-o", "p", "--shape", "x"],
        ["compile", "MODEL", "-o", "p", "--shape", "x=0x3"],
        ["compile", "MODEL", "-o", "p", "--target", "quantum"],
        ["compile", "MODEL", "-o", "p", "--shape", "1x3x32x32"],
        ["compile", "MODEL", "-o", "p", "--shape", "foo=1x3x32x32"],
        ["inspect", "MODEL", "--shape", "foo=1x3"],
        ["compile", "MODEL", "-o", "p", "--shape", "x=1x3x8x8"],
        ["compile", "MODEL", "-o", "p", "--shape", "x=2x3x8x8", "--shape", "x=1x3x8x8"],
        ["verify", "PACKAGE", "--random", "-1"],
        ["verify", "PACKAGE", "--random", "0"],
        ["verify", "PACKAGE", "--seed", "-3"],
        ["run", "PACKAGE", "--inputs", "none.npz", "-o", "o.npz"],
        ["bench", "PACKAGE", "--threads", "0"],
        ["bench", "PACKAGE", "--iterations", "0"],
    ],
)
def test_wrong_arguments(
    arguments: list[str], model: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([{"MODEL": str(model), "PACKAGE": str(package)}.get(a, a) for a in arguments]) == 2
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "no.onnx"), "--json"]) == 3
    fields = json.loads(capsys.readouterr().out)
    assert fields["exit_code"] == 3 and fields["error"] == "ModelError" and fields["where"]


@pytest.mark.parametrize(
    "arguments, near",
    [
        (["compile", "m.onnx", "-o", "p", "--targt", "host"], "--target"),
        (["compile", "m.onnx", "-o", "p", "--tar", "host"], "--target"),  # no option is shortened in silence
        (["compile", "m.onnx", "--outptu=p"], "--output"),
        (["compil", "m.onnx"], "compile"),
        (["compile", "m.onnx", "-o", "p", "--qqqq"], ""),
        (["bench", "p", "--itertions", "3"], "--iterations"),
    ],
)
def test_a_misspelled_option_or_command(arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and error.endswith(f"did you mean {near}?") == bool(near), error


@pytest.mark.parametrize(
    "arguments, json_there",
    [
        (["run", "p.hawq", "--json"], True),
        (["compil", "m.onnx", "--json"], True),
        (["inspect", "--json", "m.onnx", "--targt"], True),
        (["bench", "--json"], True),
        (["bench", "--json", "f.json"], False),  # its JSON goes to a file
        (["run", "p.hawq"], False),
    ],
)
def test_a_wrong_command_line_as_json(
    arguments: list[str], json_there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(arguments)
    out = capsys.readouterr().out
    assert e.value.code == 2 and bool(out) == json_there
    if json_there:
        fields = json.loads(out)
        assert fields["exit_code"] == 2 and fields["error"] == "UsageError" and fields["message"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY"])
def test_broken_inputs_file(package: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.npz").write_bytes(content)
    assert main(["run", str(package), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]) == 2
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 3, 8, 8)), "remedy: give array.astype('float32')"),
        (np.zeros((1, 3, 8, 8), np.float32), "another shape"),
        (np.full((2, 3, 8, 8), np.nan, np.float32), "contains NaN"),
        (None, "other names"),
    ],
)
def test_wrong_inputs(
    array: Any, words: str, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **({"y": np.zeros(1)} if array is None else {"x": array}))
    assert main(["run", str(package), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.npz"]


@pytest.mark.parametrize(
    "dtype, given, words",
    [
        ("int64", np.float32, "give array.astype('int64') if its values fit"),
        ("bool", np.float32, "give array.astype('bool') if its values fit"),
        ("int8", np.float32, "divide by the scale"),
    ],
)
def test_positions_and_masks_have_no_scale(dtype: str, given: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        checked({"x": np.zeros(3, given)}, [TensorSpec("x", dtype, dtype, (3,))], "p")


def test_what_a_proof_says_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {
        "ok": True,
        "kernels": 2,
        "border": [],
        "expressions": 1,
        "instructions": 1,
        "tir_offenders": [],
        "code_offenders": [],
        "float_tail": [],
        "least_margin": None,
        "differing": 0,
        "thresholds": 5,
        "distances": {"a": 8.7, "b": 1e-5},
        "not_enumerated": ["two", "two", "wide"],
    }
    show.show_proof(fields)
    out = capsys.readouterr().out
    assert "2 layers within 1/2 + 8.7 steps of the real formula\n" in out
    assert out.endswith("not compared with the real formula, for there are too many: two, wide\n")
    assert (inputs_text(1), inputs_text(2)) == ("1 input", "2 inputs")


def test_an_npy_file_is_no_npz_file(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", np.zeros((2, 3, 8, 8), np.float32))
    assert main(["run", str(package), "--inputs", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.npz")]) == 2
    error = capsys.readouterr().err
    assert "one array without a name" in error and "numpy.savez" in error and "internal error" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "MODEL", "-o", "PATH"],
        ["run", "PACKAGE", "--inputs", "IN", "-o", "PATH"],
        ["bench", "PACKAGE", "--json", "PATH"],
        ["profile", "PACKAGE", "--svg", "PATH"],
        ["profile", "PACKAGE", "--overlay", "PATH"],
    ],
)
@pytest.mark.parametrize("place", ["none/x", "folder", "file/x", "n" * 300])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str],
    place: str,
    model: Path,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    for name in ("load", "compile"):
        monkeypatch.setattr(f"hawq_tvm.package.package.{name}", work)
    (tmp_path / "folder" / "kept").mkdir(parents=True)
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    known = {"MODEL": str(model), "PACKAGE": str(package), "IN": "in.npz", "PATH": str(tmp_path / place)}
    assert main([known.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert (
        place in error
        and len(error.strip().splitlines()) == 1
        and ("cannot be written" in error or "is not a package" in error)
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_float_tail_is_named_wherever_the_proof_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 3, 4, 4]), 0.1, 3), g.weight([4, 3, 1, 1])), 0.2)
    model, place = tmp_path / "tail.onnx", str(tmp_path / "tail.hawq")
    onnx.save(g.model([float_output(g.node("Softmax", [y], axis=1))]), str(model))
    for command in (
        ["compile", str(model), "-o", place, "--allow-float-tail", "--quiet"],
        ["info", place],
        ["prove", place],
        ["verify", place],
    ):
        assert main(command) == 0
        (line,) = (t for t in capsys.readouterr().out.splitlines() if t.startswith("FLOAT"))
        assert "softmax_" in line, command
    for verb in ("info", "prove", "verify"):
        assert main([verb, place, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["float_tail"]


def test_the_installed_command_and_its_usage_errors() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hawq_tvm.cli", "frobnicate"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "invalid choice" in done.stderr
    done = subprocess.run([sys.executable, "-m", "hawq_tvm.cli", "--help"], capture_output=True, text=True, check=True)
    assert "exit codes" in done.stdout


def test_importing_the_package_is_light() -> None:
    code = "import hawq_tvm, sys; print([m for m in ('torch', 'onnx', 'tvm', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_leave_torch_to_who_needs_it(model: Path) -> None:
    """TVM imports PyTorch wherever it is installed: two of the three seconds in which a model is refused."""
    code = (
        "import sys; from hawq_tvm.cli import main; code = main(['inspect', sys.argv[1]]);"
        "heavy = {'torch', 'scipy', 'onnxruntime', 'tvm.backend.cuda.ptx', 'tvm.runtime.disco'};"
        "assert 'tvm' in sys.modules and not heavy & set(sys.modules); import torch; sys.exit(code)"
    )
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_gpu_target_brings_what_tvm_has_for_gpus(model: Path) -> None:
    code = (
        "import sys; from hawq_tvm.cli import main; code = main(['inspect', sys.argv[1], '--target', 'cuda-sm80']);"
        "assert 'tvm.backend.cuda.ptx' in sys.modules and 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

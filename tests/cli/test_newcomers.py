"""What somebody meets who uses the commands for the first time: said in a line, and at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from hawq_tvm.cli import main
from hawq_tvm.measure.machine import available_cores
from hawq_tvm.quantize import progress
from hawq_tvm.quantize.allocate.sensitivity import Step

from ..models import residual_net
from ..quantize.networks import FloatNet, images
from ..quantize.networks import residual_net as float_net

BUDGET = ["--budget", "size=0.5", "-o", "x.json"]
MISSING = [
    ["quantize", "none.onnx", "--calib", "in.npz", "-o", "x.onnx"],
    ["quantize", "none.pt2", "--calib", "in.npz", "-o", "x.onnx"],
    ["quantize", "float.onnx", "--calib", "none.npz", "-o", "x.onnx"],
    ["evaluate", "none.onnx", "--data", "in.npz"],
    ["evaluate", "float.onnx", "--data", "none"],
    ["allocate", "none.onnx", "--calib", "in.npz", *BUDGET],
    ["allocate", "float.onnx", "--calib", "none.npz", *BUDGET],
    ["latency", "none.onnx", "-o", "x.json"],
    ["prune", "none.onnx", "--calib", "in.npz", "--budget", "macs=60%", "-o", "x.onnx"],
    ["prune", "float.onnx", "--calib", "none.npz", "--budget", "macs=60%", "-o", "x.onnx"],
    ["finetune", "none.onnx", "--data", "in.npz", "-o", "x.onnx"],
    ["finetune", "float.onnx", "--data", "none.npz", "-o", "x.onnx"],
    ["finetune", "float.onnx", "--data", "in.npz", "--validation", "none.npz", "-o", "x.onnx"],
]
SCRIPT = """
import sys
from hawq_tvm.cli import main
for command in {commands}:
    print(main(command), command[0], *(name for name in ("torch", "tvm", "onnx", "scipy") if name in sys.modules))
"""


def test_files_that_are_not_there_are_refused_before_libraries_load(tmp_path: Path) -> None:
    onnx.save(float_net(), tmp_path / "float.onnx")
    np.savez(tmp_path / "in.npz", x=images(2))
    script = [sys.executable, "-c", SCRIPT.format(commands=MISSING)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = done.stderr.splitlines()
    assert len(told) == len(MISSING), done.stderr
    for command, line, text in zip(MISSING, done.stdout.splitlines(), told, strict=True):
        data = any(part in command[2:] for part in ("none", "none.npz"))
        assert line == f"{2 if data else 3} {command[0]}", line
        name, why = ("none", "does not exist; expected an .npz file") if data else ("none.", "no such file; remedy")
        assert text.startswith(f"hawq-tvm: {name}") and why in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float.onnx", "in.npz"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    onnx.save(residual_net(), folder / "tiny.onnx")
    np.savez(folder / "in.npz", x=np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32))
    assert main(["compile", str(folder / "tiny.onnx"), "-o", str(folder / "tiny.hawq"), "--quiet"]) == 0
    return folder / "tiny.hawq"


def test_run_says_what_outputs_are_like(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before = sorted(package.parent.iterdir())
    out = package.parent / "out.npz"
    given = ["run", str(package), "--inputs", str(package.parent / "in.npz")]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "nothing written: -o OUT.npz keeps the outputs" in told and sorted(package.parent.iterdir()) == before
    assert main([*given, "-o", str(out)]) == 0
    with np.load(out) as arrays:
        (value,) = arrays.values()
    ends = f"{value.min():.6g} to {value.max():.6g}, mean {value.astype(np.float64).mean():.6g}"
    assert f"float32 2x10, {ends}, largest at {value.argmax()}\n" in told
    out.unlink()


def test_more_threads_than_processors(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = available_cores() + 1
    short = ["--duration", "0", "--threads", str(count)]
    for command in (
        ["bench", str(package), "--iterations", "1", "--warmup-ms", "0", *short],
        ["profile", str(package), *short],
    ):
        assert main(command) == 0
        assert f"warning: {count} threads share" in capsys.readouterr().err


def test_why_earlier_rules_did_not(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--rules"]):
        assert main(["info", str(package), *more]) == 0
        assert ("because earlier rules said" in capsys.readouterr().out) == bool(more)


def test_open_dimensions_and_names_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = FloatNet(["N", 3, 8, 8])
    onnx.save(g.model(g.conv("x", 4, 3, 3, "first")), tmp_path / "f.onnx")
    np.savez(tmp_path / "in.npz", x=images(2))
    np.savez(tmp_path / "other.npz", pictures=images(2))
    quantize = ["quantize", str(tmp_path / "f.onnx"), "-o", str(tmp_path / "q.onnx"), "--quiet", "--calib"]
    assert main([*quantize, str(tmp_path / "other.npz")]) == 2
    assert "numpy.savez(PATH, x=...)" in capsys.readouterr().err
    assert main([*quantize, str(tmp_path / "in.npz")]) == 0
    assert "OPEN    compile with --shape x=1x3x8x8, or another size" in capsys.readouterr().out
    fixed = ["--shape", "x=1x3x8x8"]
    assert main(["compile", str(tmp_path / "q.onnx"), "-o", str(tmp_path / "q.hawq"), "--quiet", *fixed]) == 0
    assert main([*quantize, str(tmp_path / "in.npz"), *fixed]) == 0
    assert "OPEN" not in capsys.readouterr().out


def test_a_phase_is_a_line_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand steps the last is told, and one every half minute."""
    clock, told = [0.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    tell = progress._lines(told.append)
    for k in range(1000):
        clock[0] += 0.125
        tell(Step("ranges", k + 1, 1000))
    tell(Step("weights", 1, 1))
    assert told == [
        "  ranges 240 of 1000",
        "  ranges 480 of 1000",
        "  ranges 720 of 1000",
        "  ranges 960 of 1000",
        "  ranges 1000 of 1000",
        "  weights 1 of 1",
    ]

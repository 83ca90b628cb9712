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

QUANTIZE = ["quantize", "float.onnx", "--calib", "in.npz", "-o"]
EVALUATE = ["evaluate", "float.onnx", "--data", "in.npz"]
ALLOCATE = ["allocate", "float.onnx", "--calib", "in.npz", "--budget", "size=0.5", "-o"]
PRUNE = ["prune", "float.onnx", "--calib", "in.npz", "--budget", "macs=60%", "-o"]
FINETUNE = ["finetune", "float.onnx", "--data", "in.npz", "-o"]
FAKE = ["compare-fake", "float.onnx", "in.npz", "--data", "in.npz", "-o"]
NO_MODEL, NO_DATA, NO_FOLDER = "no such file; remedy", "does not exist; expected an .npz file", "found no folder"
NO_BITS = "cannot be read; expected 8, 4, a choice"
# What is wrong, where it stands in the command, and what is said of it.
MISSING: list[tuple[list[str], str, str]] = [
    *((["quantize", name, *QUANTIZE[2:], "x.onnx"], name, NO_MODEL) for name in ("none.onnx", "none.pt2")),
    (["quantize", "float.onnx", "--calib", "none.npz", "-o", "x.onnx"], "none.npz", NO_DATA),
    ([*QUANTIZE, "none/x.onnx"], "none/x.onnx", NO_FOLDER),
    ([*QUANTIZE, "x.onnx", "--state", "none/x.npz"], "none/x.npz", NO_FOLDER),
    ([*QUANTIZE, "x.onnx", "--bits", "none.json"], "--bits none.json", NO_BITS),
    ([*QUANTIZE, "x.onnx", "--bits", "W9A9"], "--bits", "found 9"),
    ([*QUANTIZE, "x.onnx", "--effort", "great"], "great", "is no effort"),
    ([*QUANTIZE, "x.onnx", "--preprocess", "none.json"], "none.json", "cannot be read"),
    (["evaluate", "none.onnx", *EVALUATE[2:]], "none.onnx", NO_MODEL),
    (["evaluate", "float.onnx", "--data", "none"], "none", NO_DATA),
    ([*EVALUATE, "--against", "none.hawq"], "none.hawq", NO_MODEL),
    ([*EVALUATE, "--preprocess", "none.json"], "none.json", "cannot be read"),
    (["allocate", "none.onnx", *ALLOCATE[2:], "x.json"], "none.onnx", NO_MODEL),
    (["allocate", "float.onnx", "--calib", "none.npz", *ALLOCATE[4:], "x.json"], "none.npz", NO_DATA),
    ([*ALLOCATE, "none/x.json"], "none/x.json", NO_FOLDER),
    ([*ALLOCATE, "x.json", "--pareto", "none/p.json"], "none/p.json", NO_FOLDER),
    ([*ALLOCATE, "x.json", "--state", "none/s.npz"], "none/s.npz", NO_FOLDER),
    ([*ALLOCATE, "x.json", "--latency", "none.json"], "none.json", "cannot be read"),
    ([*ALLOCATE, "x.json", "--preprocess", "none.json"], "none.json", "cannot be read"),
    (["latency", "none.onnx", "-o", "x.json"], "none.onnx", NO_MODEL),
    (["latency", "float.onnx", "-o", "none/x.json"], "none/x.json", NO_FOLDER),
    (["prune", "none.onnx", *PRUNE[2:], "x.onnx"], "none.onnx", NO_MODEL),
    (["prune", "float.onnx", "--calib", "none.npz", *PRUNE[4:], "x.onnx"], "none.npz", NO_DATA),
    ([*PRUNE, "none/x.onnx"], "none/x.onnx", NO_FOLDER),
    (["finetune", "none.onnx", *FINETUNE[2:], "x.onnx"], "none.onnx", NO_MODEL),
    (["finetune", "float.onnx", "--data", "none.npz", "-o", "x.onnx"], "none.npz", NO_DATA),
    ([*FINETUNE, "x.onnx", "--validation", "none.npz"], "none.npz", NO_DATA),
    ([*FINETUNE, "x.onnx", "--calib", "none.npz"], "none.npz", NO_DATA),
    ([*FINETUNE, "none/x.onnx"], "none/x.onnx", NO_FOLDER),
    ([*FINETUNE, "x.onnx", "--bits", "none.json"], "--bits none.json", NO_BITS),
    (["compare-fake", "none.onnx", *FAKE[2:], "x.svg"], "none.onnx", NO_MODEL),
    (["compare-fake", "float.onnx", "none.hawq", *FAKE[3:], "x.svg"], "none.hawq", NO_MODEL),
    ([*FAKE[:3], "--data", "none.npz", "-o", "x.svg"], "none.npz", NO_DATA),
    ([*FAKE, "none/x.svg"], "none/x.svg", NO_FOLDER),
    ([*FAKE, "x.svg", "--float", "none.onnx"], "none.onnx", NO_MODEL),
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
    script = [sys.executable, "-c", SCRIPT.format(commands=[command for command, _, _ in MISSING])]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = done.stderr.splitlines()
    assert len(told) == len(MISSING), done.stderr
    for (command, name, why), line, text in zip(MISSING, done.stdout.splitlines(), told, strict=True):
        assert line == f"{3 if why == NO_MODEL else 2} {command[0]}", line
        assert text.startswith(f"hawq-tvm: {name}: ") and why in text, text
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

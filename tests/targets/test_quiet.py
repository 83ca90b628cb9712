"""What commands leave to TVM and LLVM to say: nothing. And what they print is whole where a file or a program reads
it.
"""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tvm import relax

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.cli.terminal import OUT, Grid
from hawq_tvm.core import ops
from hawq_tvm.measure import race as races
from hawq_tvm.quantize.allocate import plan
from hawq_tvm.tuning import tuner

from ..models import Graph, float_output

ROOT = Path(__file__).parents[2]
LONG = "a/module/of/a/module/of/a/module/whose/name/is/longer/than/a/terminal/is/wide/and/has[brackets]/in/it"


def named() -> onnx.ModelProto:
    """Two convolutions whose layers have long names."""
    g = Graph()
    x = g.qdq(g.input("x", [1, 8, 6, 6]), 0.05, 128)
    y = g.qdq(g.conv(x, g.weight([8, 8, 1, 1])), 0.05, 128)
    made = g.model([float_output(g.qdq(g.conv(y, g.weight([8, 8, 1, 1])), 0.05, 128))])
    first = next(n for n in made.graph.node if n.op_type == "Conv")
    old, first.name = first.output[0], LONG
    for i, n in enumerate(made.graph.node):
        n.name = n.name if n.op_type != "QuantizeLinear" else f"{LONG}_{i}"
        n.output[:] = [LONG if o == old else o for o in n.output]
        n.input[:] = [LONG if i == old else i for i in n.input]
    return made


def refused() -> onnx.ModelProto:
    """A network with an operator that nobody can make integer, of a long name, in the middle."""
    made = named()
    for n in made.graph.node:
        n.input[:] = ["log" if i == LONG else i for i in n.input]
    place = next(i for i, n in enumerate(made.graph.node) if "log" in n.input)
    made.graph.node.insert(place, helper.make_node("LogSoftmax", [LONG], ["log"], name=LONG))
    return made


def test_a_builder_that_an_error_leaves_warns_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    x = relax.Var("x", relax.TensorType((2,), "int32"))
    for inside in (False, True):
        builder = ops.Builder()
        with pytest.raises(ZeroDivisionError), builder.function("main", [x]):
            if inside:
                with builder.dataflow():
                    builder.emit(relax.op.add(x, x))
                    raise ZeroDivisionError
            raise ZeroDivisionError
        del builder
    gc.collect()
    assert capfd.readouterr().err == ""


def test_everybody_builds_with_it() -> None:
    folders = ("hawq_tvm", "relay_passes", "schedules")
    plain = [
        str(p)
        for f in folders
        for p in (ROOT / f).rglob("*.py")
        if re.search(r"relax\.BlockBuilder\(\)", p.read_text())
    ]
    assert plain == []


@pytest.mark.parametrize("verb", ["inspect", "compile"])
def test_a_refusal_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    nan = named()
    for one in nan.graph.initializer:
        if one.data_type == TensorProto.FLOAT:
            one.float_data[:] = [float("nan")] * len(one.float_data)
    for model in (refused(), nan):
        onnx.save(model, str(tmp_path / "m.onnx"))
        options = ["-o", str(tmp_path / "m.hawq"), "--quiet"] if verb == "compile" else []
        assert main([verb, str(tmp_path / "m.onnx"), *options]) == 3
        gc.collect()
        lines = capfd.readouterr().err.splitlines()
        assert all(line.startswith("hawq-tvm: ") for line in lines) and len(lines) <= 1


def piped(*arguments: object, columns: str = "80") -> str:
    """What a command prints into a pipe."""
    words = [sys.executable, "-m", "hawq_tvm.cli", *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": columns}
    ).stdout


def test_names_are_whole_in_every_table_of_a_pipe(tmp_path: Path) -> None:
    onnx.save(named(), str(tmp_path / "m.onnx"))
    onnx.save(refused(), str(tmp_path / "bad.onnx"))
    package = ht.compile(tmp_path / "m.onnx")
    package.save(tmp_path / "m.hawq")
    names = [row["layer"] for row in package.report()]
    assert any(len(n) > 80 for n in names)
    for command in (
        ["verify", tmp_path / "m.hawq"],
        ["info", tmp_path / "m.hawq"],
        ["profile", tmp_path / "m.hawq", "--duration", "0.01"],
    ):
        text = piped(*command)
        assert all(name in text for name in names) and "…" not in text, command
    assert LONG in piped("inspect", tmp_path / "bad.onnx")


def test_a_terminal_folds_and_cuts_nothing() -> None:
    """A terminal of 40 columns has every letter, in its lines' order."""
    code = (
        f"from hawq_tvm.cli.terminal import OUT, Grid\ngrid = Grid('layer', 'n')\ngrid.add_row({LONG!r},"
        " '1')\nOUT.print(grid)"
    )
    master, slave = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", code], stdout=slave, env={**os.environ, "COLUMNS": "40", "TERM": "xterm"}
    )
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        text += part
    os.close(master)
    assert done.wait() == 0
    lines = re.sub(rb"\x1b\[[0-9;]*m", b"", text).decode().splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(re.split("[│┃]", line)[1].strip() for line in lines if "│" in line) == LONG


def test_a_file_has_no_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("20", "80", ""):
        monkeypatch.setenv("COLUMNS", columns)
        grid = Grid("layer", "n")
        grid.add_row(LONG, "1")
        OUT.print(grid)
        OUT.print("word " * 100)
        out = capsys.readouterr().out
        assert LONG in out and ("word " * 100).strip() in out and max(map(len, out.splitlines())) < 600


def test_tune_interrupted_before_anything_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(named(), str(tmp_path / "m.onnx"))
    arguments = ["tune", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "r.json"), "--trials", "4", "--quiet"]

    def interrupted(*_: object) -> races.Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "race", interrupted)
    assert main(arguments) == 130
    said = capsys.readouterr().err
    assert (
        "interrupted before a result was kept; no file was written" in said
        and "r.json" not in said
        and not (tmp_path / "r.json").exists()
    )
    # Of an earlier run.
    (tmp_path / "r.json").write_text(json.dumps({"format": "hawq_tvm tile records 1", "entries": {}}))
    assert main(arguments) == 130 and "r.json" in capsys.readouterr().err


def test_allocate_interrupted_names_the_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Conv", ["x", "w"], ["y"])],
                "one",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])],
                [onnx.numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w")],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        ),
        str(tmp_path / "f.onnx"),
    )
    state = tmp_path / "bits.state.npz"
    kept = [False]

    def interrupted(*_: object, **options: object) -> None:
        assert str(options["state"]) == str(state)
        if kept[0]:
            state.write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "problem", interrupted)
    arguments = [
        "allocate",
        str(tmp_path / "f.onnx"),
        "--calib",
        str(tmp_path),
        "--budget",
        "bops=0.6",
        "-o",
        str(tmp_path / "bits.json"),
    ]
    assert main(arguments) == 130 and "no file was written" in capsys.readouterr().err
    kept[0] = True
    assert main(arguments) == 130 and f"is in {state}, and the same command continues" in capsys.readouterr().err


def test_what_libraries_announce_is_for_those_who_debug(tmp_path: Path) -> None:
    """A FutureWarning of PyTorch's, say; HAWQ_TVM_DEBUG=1 and python -W show it."""
    code = (
        "import sys, warnings\nfrom hawq_tvm.cli import commands as cli\n"
        "def warn(args):\n    warnings.warn('of a library', FutureWarning)\n    return 0\n"
        "cli.COMMANDS['inspect'] = warn\nsys.exit(cli.run(['inspect', 'x']))"
    )
    for options, debug, shown in (((), "0", False), ((), "1", True), (("-W", "default"), "0", True)):
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HAWQ_TVM_DEBUG": debug},
        )
        assert done.returncode == 0 and ("of a library" in done.stderr) == shown

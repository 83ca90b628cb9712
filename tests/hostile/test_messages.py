"""Every problem is named, in the same words by inspect and compile, and no name reaches a terminal as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import HawqError, ModelError
from hawq_tvm.core.printable import printable

from .models import F, between, node, refusal, weight

EVIL = "n\x1b[31m\x1b]0;owned\x07\u202e\u2028\r\n\x9b"


def test_printable() -> None:
    assert printable("plain naïve 图 [b] \\") == "plain naïve 图 [b] \\"
    assert (
        printable(EVIL) == r"n\x1b[31m\x1b]0;owned\x07\u202e\u2028\r\n\x9b" and printable("\ud800\x7f") == r"\ud800\x7f"
    )


def test_errors_hold_no_control_characters_and_no_endless_names() -> None:
    error = ModelError(f"reads {EVIL!r} and {EVIL}", where=EVIL, expected=EVIL, found=EVIL, remedy=EVIL)
    assert str(error).isprintable() and error.where == EVIL
    assert len(str(HawqError("x" * 10**6, where="y" * 10**6, found="z" * 10**6))) < 5000


def everything_printed(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    main(argv)
    out, err = capfd.readouterr()
    assert not (set(out + err) - set("\n")) & {chr(c) for c in [*range(32), *range(127, 160), 0x202E, 0x2028]}, (
        out,
        err,
    )
    return out + err


def named(name: str) -> onnx.ModelProto:
    w, constants = weight()
    model = between([*w, node("Conv", ["d", "w"], ["o"], name=name)], constants)
    for text in (model.graph.input[0], model.graph.output[0]):
        text.name += name
    model.graph.node[0].input[0] += name
    model.graph.node[-1].output[0] += name
    return model


def test_control_characters_in_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, package = tmp_path / "m.onnx", str(tmp_path / "p.hawq")
    onnx.save(named(EVIL), path)
    shown = [
        everything_printed(argv, capfd)
        for argv in (
            ["inspect", str(path)],
            ["compile", str(path), "-o", package],
            ["info", package],
            ["verify", package],
            ["prove", package],
        )
    ]
    assert all(r"\x1b]0;owned" in text for text in shown[:4])
    assert EVIL in ht.load(package).inputs[0].name and repr(ht.load(package)).isprintable()
    assert json.loads(everything_printed(["inspect", str(path), "--json"], capfd))["compilable"]


def test_control_characters_in_refusals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        between([node(f"Frob{EVIL}", ["d"], ["o"], name=EVIL), node("LRN", ["d"], [EVIL], size=3)], {}, more=[EVIL]),
        path,
    )
    for argv in (
        ["inspect", str(path)],
        ["compile", str(path), "-o", str(tmp_path / "p")],
        ["inspect", str(tmp_path / EVIL)],
        ["compile", f"--{EVIL}"],
    ):
        try:
            assert "\\x1b" in everything_printed(argv, capfd)
        except SystemExit:
            assert "\x1b" not in "".join(capfd.readouterr())
    assert str(tmp_path / "p") and not (tmp_path / "p").exists()


def test_brackets_in_names_are_no_markup(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(between([node("LRN", ["d"], ["o"], size=3, name="[/red] [bold]:smile:")], {}), path)
    assert "[/red] [bold]:smile:" in everything_printed(["inspect", str(path)], capfd)


def test_names_in_piped_tables_are_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, name = tmp_path / "m.onnx", "a_layer/" * 30
    onnx.save(between([node("LRN", ["d"], ["o"], size=3, name=name)], {}), path)
    table = everything_printed(["inspect", str(path)], capfd).splitlines()
    assert any(name in line and "LRN" in line for line in table)


# -- all problems at once --------------------------------------------------------------------------------------


def problems(model: onnx.ModelProto) -> list[str]:
    report = ht.inspect(model)
    assert report.error == refusal(model)
    return [p["layer"] for p in (*report.unsupported, *report.float_layers)]


def test_problems_of_the_graph_of_operators_and_of_layers_together() -> None:
    nodes = [
        node("Relu", ["ghost"], ["g1"], name="reader"),
        node("LRN", ["d"], ["l"], size=3, name="lrn"),
        node("Det", ["l"], ["det"], name="det"),
        node("Exp", ["g1"], ["e"], name="skipped"),
        node("Concat", ["d", "d"], ["cc"], name="cat", axis=9),
        node("Relu", ["d"], ["o"], name="fine"),
    ]
    assert problems(between(nodes, {}, more=["det", "e", "cc"])) == ["reader", "lrn", "det", "cat"]


def test_a_layer_behind_a_failed_layer_is_judged_on_its_own() -> None:
    nodes = [
        node("LogSoftmax", ["d"], ["a"], name="first", axis=1),
        node("QuantizeLinear", ["a", "s", "z"], ["aq"]),
        node("DequantizeLinear", ["aq", "s", "z"], ["ad"]),
        node("LogSoftmax", ["ad"], ["b"], name="second", axis=1),
        node("Relu", ["b"], ["o"], name="fine"),
    ]
    assert problems(between(nodes, {})) == ["first", "second"]


def test_what_cannot_be_imported_hides_no_layer_before_it() -> None:
    nodes = [
        node("LogSoftmax", ["d"], ["a"], name="log", axis=1),
        node("Relu", ["a"], ["o"]),
        node("LRN", ["d"], ["l"], size=3, name="lrn"),
    ]
    assert problems(between(nodes, {}, more=["l"])) == ["lrn", "log"]


def test_several_open_and_impossible_inputs() -> None:
    model = between([node("Add", ["d", "b"], ["o"])], {})
    model.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.DOUBLE, [4]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N\x1b"
    assert problems(model) == ["input 'x'", "input 'b'"]


def test_damaged_initializers_are_blamed_as_compile_blames_them() -> None:
    model = between([node("Relu", ["d"], ["o"])], {})
    model.graph.initializer[1].dims.append(2)
    assert refusal(model).startswith("initializer 'z': has data that does not fit its shape")


# -- odd graphs --------------------------------------------------------------------------------------------------


def changed(change: str) -> onnx.ModelProto:
    model = between([node("Relu", ["d"], ["o"], name="n")], {})
    if change == "opset":
        model.opset_import[0].version = 2**40
    elif change == "ir":
        model.ir_version = -1
    elif change == "sparse":
        model.graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(
                onnx.numpy_helper.from_array(np.ones(1, F), "thin"), onnx.numpy_helper.from_array(np.array([0])), [4]
            )
        )
    elif change == "outputs":
        del model.graph.output[:]
    elif change == "nodes":
        del model.graph.node[:]
    elif change == "cycle":
        model.graph.node[0].input[0] = "y"
    elif change == "twice":
        model.graph.node.append(node("Tanh", ["d"], ["o"], name="m"))
    elif change == "string":
        model.graph.initializer.append(onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [1], [b"a"]))
    elif change == "nameless":
        model.graph.initializer[0].name = ""
    elif change == "size 0":
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0
    elif change == "huge":
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**62
    return model


@pytest.mark.parametrize(
    "change, words",
    [
        ("opset", "operator set"),
        ("ir", "IR version"),
        ("sparse", "'thin'"),
        ("outputs", "no output"),
        ("nodes", "nothing computes"),
        ("cycle", "its own output"),
        ("twice", "second time"),
        ("string", "'words'"),
        ("nameless", "without a name"),
        ("size 0", "not fixed"),
        ("huge", "impossible shape"),
    ],
)
def test_odd_graphs(change: str, words: str) -> None:
    assert words in refusal(changed(change))


def test_a_branch_that_reads_nothing() -> None:
    value = [onnx.ValueInfoProto(name="b")]
    bad, good = (
        onnx.helper.make_graph([node("Relu", [n], ["b"], name="inner")], "branch", [], value) for n in ("ghost", "d")
    )
    model = between([node("If", ["k"], ["o"], name="if", then_branch=bad, else_branch=good)], {"k": np.array(True)})
    assert "'ghost'" in refusal(model)


def test_integers_without_arithmetic() -> None:
    from .models import graph

    assert refusal(
        graph([node("Neg", ["x"], ["y"], name="neg")], {"x": (onnx.TensorProto.INT8, [4])}, ["y"], {})
    ).startswith("neg: cannot be integer")

"""Float ends that cannot be compiled: cut off into an ONNX model of the package, and joined again by ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import hawq_tvm as ht
from deploy import package as files
from hawq_tvm.cli import main
from hawq_tvm.core import cut
from hawq_tvm.core.errors import ModelError, PackageError, UsageError
from hawq_tvm.frontend.onnx import import_before_cut, import_onnx
from hawq_tvm.package import direct, runtime
from hawq_tvm.verify.reference import evaluate

from ..frontend.onnx_models import onnxruntime
from ..models import Graph, float_output

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SHAPE = (2, 4, 5)


def quantized(g: Graph) -> str:
    """A quantized tensor of SHAPE in real numbers."""
    x = g.qdq(g.input("x", SHAPE), np.float32(0.05), 100)
    return g.qdq(g.node("Relu", [x]), np.float32(0.05), 3)  # no ties: ONNX Runtime rounds a float32 quotient


def ints(g: Graph, *values: Any) -> str:
    return g.constant(np.array(values), INT64)


def feed(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(0, 3, SHAPE).astype(np.float32)}


def scattered(g: Graph, y: str) -> str:
    where = ints(g, [[0, 1, 2]], [[1, 0, 4]])
    return g.node("ScatterND", [y, where, g.constant(np.full((2, 1), 7.5), FLOAT)])


def counted(g: Graph, y: str) -> str:
    """A Loop that reads a tensor from outside by its name."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Add", ["sum", y], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", FLOAT, SHAPE),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, SHAPE),
        ],
    )
    return g.node("Loop", [g.constant(3, INT64, ()), "", y], body=body)


ENDS = {
    "CumSum": lambda g, y: g.node("CumSum", [y, g.constant(1, INT64, ())]),
    "GatherND": lambda g, y: g.node("GatherND", [y, ints(g, [0, 1], [1, 3])]),
    "GatherElements": lambda g, y: g.node("GatherElements", [y, ints(g, [[0, 3, 2]])], axis=2),
    "ScatterND": scattered,
    "Einsum": lambda g, y: g.node("Einsum", [y, y, y], equation="bij,bkj,blj->bikl"),
    "NonZero": lambda g, y: g.node("NonZero", [y]),
    "TopK": lambda g, y: g.node("TopK", [y, ints(g, 2)], outputs=2, axis=-1),
    "ReduceL1": lambda g, y: g.node("ReduceL1", [y, ints(g, 1)]),
    "ReduceL2": lambda g, y: g.node("Div", [y, g.node("ReduceL2", [y, ints(g, 2)])]),
    "ReduceLogSumExp": lambda g, y: g.node("ReduceLogSumExp", [y, ints(g, -1)], keepdims=0),
    "ReduceProd": lambda g, y: g.node("ReduceProd", [y, ints(g, 2)]),
    "LpNormalization": lambda g, y: g.node("LpNormalization", [y], axis=1, p=2),
    "MeanVarianceNormalization": lambda g, y: g.node("MeanVarianceNormalization", [y], axes=[0, 2]),
    "OneHot": lambda g, y: g.node("OneHot", [g.node("ArgMax", [y], axis=2), ints(g, 5), g.constant([0.0, 1.0], FLOAT)]),
    "Unique": lambda g, y: g.node("Unique", [y]),
    "Trilu": lambda g, y: g.node("Trilu", [y]),
    "Range": lambda g, y: g.node(
        "Range", [g.constant(0.0, FLOAT, ()), g.node("ReduceMax", [y], keepdims=0), g.constant(1.0, FLOAT, ())]
    ),
    "a step known at run time": lambda g, y: g.node(
        "Slice",
        [
            y,
            ints(g, 0),
            g.node("Cast", [g.node("ReduceMax", [g.node("ReduceMax", [y, ints(g, 0, 1)], keepdims=0)])], to=INT64),
        ],
    ),
    "Loop": counted,
    "Cast to a type that no library returns": lambda g, y: g.node("Cast", [y], to=TensorProto.DOUBLE),
    "NonZero of a comparison": lambda g, y: g.node("NonZero", [g.node("Greater", [y, g.constant(0.5, FLOAT)])]),
    "Slice of nothing": lambda g, y: g.node("Slice", [y, ints(g, 1), ints(g, 1)]),
}


@pytest.mark.parametrize("name", ENDS)
def test_any_standard_operator_may_stand_in_a_float_end(name: str) -> None:
    g = Graph(0, opset=21)
    model = g.model([ENDS[name](g, quantized(g))])
    kinds = {"NonZero": INT64, "Cast": TensorProto.DOUBLE}
    model.graph.output[0].type.tensor_type.elem_type = kinds.get(name.split()[0], FLOAT)
    module = import_before_cut(model)
    found = cut.of_main(module["main"])
    assert found is not None
    head = evaluate(module, feed())
    end = onnx.load_from_string(cut.model_of(module["main"]))
    assert [i.name for i in end.graph.input] == list(found.tensors)
    types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in end.graph.input}
    (got,) = onnxruntime(end, {n: np.asarray(head[n]).astype(t) for n, t in types.items()}).values()
    (wanted,) = onnxruntime(model, feed()).values()
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # both sum in float32, in some order


def detector() -> onnx.ModelProto:
    """An end of two branches: what TopK reads is also an output, another output does not come by the cut, sizes come
    as an input, and a constant of the rest is read.
    """
    g = Graph(0)
    y = quantized(g)
    y = g.node("Sigmoid", [y])
    size = g.input("size", [1])
    k = g.node("Div", [g.node("Size", [y]), ints(g, 20)])  # 2, whatever the data
    top = g.node("TopK", [y, k], outputs=2)
    scaled = g.node("Mul", [size, top])
    mean = g.node("ReduceMean", [y, ints(g, 1)])
    outputs = [float_output(scaled), (f"{top}_1", INT64), float_output(y), float_output(mean)]
    return g.model(outputs)


def other() -> onnx.ModelProto:
    g = Graph()
    return g.model([float_output(g.node("Relu", [g.input("unheard of", [1])]))])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ht.compile(detector(), allow_float_tail=True).save(tmp_path_factory.mktemp("cut") / "cut.hawq")


def given() -> dict[str, np.ndarray]:
    return {**feed(3), "size": np.array([640], np.float32)}


def test_the_outputs_are_the_models_in_their_order(package: Path) -> None:
    model, opened = detector(), ht.load(package)
    wanted = onnxruntime(model, given())
    for got in (opened.run(given()), runtime.load(package).run(given())):
        assert list(got) == list(wanted)
        for name, value in wanted.items():
            assert got[name].dtype == value.dtype
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)  # sigmoid and mean in float32


def test_the_cut_is_named_and_the_integer_part_proved(package: Path) -> None:
    opened = ht.load(package)
    manifest = opened.manifest
    assert manifest["cut"]["tensors"] == ["sigmoid_5"] and manifest["cut"]["outputs"] == list(opened.run(given()))
    assert manifest["cut"]["nodes"][0].endswith("(TopK)")
    assert opened.verify(random=2).ok and opened.prove().ok
    names = [s.name for s in opened.outputs]
    assert names == list(opened.run(given(), tail=False)) == ["sigmoid_5", names[1]]
    with direct.Model(opened.library, 1) as c:  # the C interface gives the tensors at the cut
        c.set_inputs([given()[i.name] for i in opened.inputs])
        c.run()
        np.testing.assert_array_equal(c.outputs()[0], opened.run(given(), tail=False)["sigmoid_5"])
    end = onnx.load(package / files.TAIL)
    assert sorted(i.name for i in end.graph.input) == ["sigmoid_5", "size"]


def test_inspect_says_what_compile_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(detector(), path)
    assert main(["inspect", str(path), "--allow-float-tail"]) == 0
    *_, verdict, cut = capsys.readouterr().out.splitlines()
    assert ", up to where the float end is cut off, with FLOAT outside the integer region: sigmoid_5, " in verdict
    assert cut.startswith("CUT     behind sigmoid_5: topk")
    assert main(["inspect", str(path), "--allow-float-tail", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut"]["tensors"] == ["sigmoid_5"]
    assert main(["inspect", str(path)]) == 3
    assert (
        "operator TopK is not supported" in (out := capsys.readouterr().out) and "--allow-float-tail cuts it off" in out
    )


def test_commands(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", **given())
    for more, expected in (([], 4), (["--no-tail"], 2)):
        call = ["run", str(package), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz"), *more]
        assert main(call) == 0 and len(np.load(tmp_path / "out.npz").files) == expected
    capsys.readouterr()
    for verb in ("info", "prove", "verify"):
        assert main([verb, str(package)]) == 0 and "CUT     behind sigmoid_5" in capsys.readouterr().out
    small = tmp_path / "small.hawq"
    assert main(["strip", str(package), "-o", str(small), "--single-file"]) == 0
    assert list(ht.load(small).run(given())) == list(ht.load(package).run(given()))


def test_the_whole_model_is_no_rival_of_the_library(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rival = ["bench", str(package), "--against", "onnxruntime", "--model", str(tmp_path / "whole.onnx")]
    assert main(rival) == 3 and "whole.onnx: no such file" in capsys.readouterr().err
    onnx.save(detector(), tmp_path / "whole.onnx")
    assert main(rival) == 3
    assert "ends where the float end was cut off; expected a model that ends at sigmoid_5" in capsys.readouterr().err


def test_without_onnx_runtime_one_sentence_says_how(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for opened in (ht.load(package), runtime.load(package)):
        with pytest.raises(UsageError, match=r"tail\.onnx.*pip install onnxruntime, or run without the tail"):
            opened.run(given())
        assert len(opened.run(given(), tail=False)) == 2


def test_an_end_that_lies_is_refused_in_one_sentence(package: Path, tmp_path: Path) -> None:
    from .test_lies import reseal

    for number, data in enumerate((b"", b"no model", other().SerializeToString())):
        folder = Path(shutil.copytree(package, tmp_path / f"{number}.hawq"))
        (folder / files.TAIL).write_bytes(data)
        with pytest.raises(PackageError, match="does not match its checksum"):
            ht.load(folder)
        reseal(folder, lambda manifest: None)
        with pytest.raises(PackageError, match="float end") as caught:
            ht.load(folder).run(given())
        assert "\n" not in str(caught.value)
    (folder / files.TAIL).unlink()
    with pytest.raises(PackageError, match=r"a file is missing; found no tail\.onnx"):
        ht.load(folder)
    whole = Path(shutil.copytree(package, tmp_path / "extra.hawq"))
    reseal(whole, lambda manifest: manifest.pop("cut"))
    with pytest.raises(PackageError, match=r"does not belong there; found tail\.onnx"):
        ht.load(whole)


# -- refusals ------------------------------------------------------------------------------------------------


def behind(g: Graph, y: str) -> str:
    """A quantized tensor behind an operator that is not compiled."""
    y = g.node("CumSum", [y, g.constant(1, INT64, ())])
    return g.qdq(y, np.float32(0.1), 0)


def test_a_product_of_quantized_tensors_behind_it_keeps_an_operator_from_being_cut_off() -> None:
    g = Graph()
    y = g.node("MatMul", [behind(g, quantized(g)), g.weight([5, 3], axis=None)])
    model = g.model([float_output(g.qdq(y, np.float32(0.1), 0))])
    with pytest.raises(ModelError, match=r"cumsum_\d+: .*constants only"):
        import_before_cut(model)


def test_what_only_quantizes_behind_it_does_not() -> None:
    """Tools quantize around movement, too."""
    g = Graph()
    y = g.node("Transpose", [behind(g, quantized(g))], perm=[0, 2, 1])
    model = g.model([float_output(g.qdq(y, np.float32(0.1), 0))])
    module = import_before_cut(model)
    found = cut.of_main(module["main"])
    assert found is not None and len(found.nodes) == 6
    (tensor,) = found.tensors
    end = onnx.load_from_string(cut.model_of(module["main"]))
    (got,) = onnxruntime(end, {tensor: evaluate(module, feed())[tensor].astype(np.float32)}).values()
    (wanted,) = onnxruntime(model, feed()).values()
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("op", "domain"), [("NoSuchOperator", ""), ("Strange", "my.own")])
def test_only_standard_operators_are_cut_off(op: str, domain: str) -> None:
    g = Graph()
    model = g.model([float_output(g.node(op, [quantized(g)], domain))])
    with pytest.raises(ModelError, match=f"{op} is not supported"):
        import_before_cut(model)


def test_an_end_that_onnx_refuses_is_refused() -> None:
    g = Graph()
    model = g.model([float_output(g.node("Einsum", [quantized(g)], equation="ij->i"))])
    with pytest.raises(ModelError, match=r"einsum_\d+ \(Einsum\): begins the float end.*ONNX refuses"):
        import_before_cut(model)


def test_a_float_model_is_not_cut_into_nothing() -> None:
    g = Graph()
    model = g.model([float_output(g.node("TopK", [g.input("x", SHAPE), ints(g, 1)], outputs=2))])
    with pytest.raises(ModelError, match="TopK is not supported"):
        import_before_cut(model)


def test_an_input_may_be_an_output_beside_a_cut() -> None:
    g = Graph()
    top = g.node("TopK", [quantized(g), ints(g, 2)], outputs=2)
    module = import_before_cut(g.model([float_output("x"), float_output(top)]))
    found = cut.of_main(module["main"])
    assert found is not None and found.outputs == ("x", top)
    np.testing.assert_array_equal(evaluate(module, feed())["x"], feed()["x"])


def test_a_model_that_needs_no_cut_is_not_cut() -> None:
    g = Graph()
    model = g.model([float_output(g.node("Softmax", [quantized(g)]))])
    assert cut.of_main(import_before_cut(model)["main"]) is None
    np.testing.assert_array_equal(
        *(m(model)["main"].attrs["hawq.output_names"] for m in (import_onnx, import_before_cut))
    )

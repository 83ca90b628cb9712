"""Models compiled in I-BERT's arithmetic: their outputs are those of the paper's algorithms, rounded."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
import pytest
from onnx import helper

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError, UsageError

from .. import paper_ibert
from ..frontend.onnx_models import graph_model, integers

f4 = np.float32


def qdq(name: str, source: str, scale: str, zero: str, target: str) -> list[onnx.NodeProto]:
    """A QuantizeLinear and its DequantizeLinear."""
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [f"{name}.q"], name=f"{name}.q"),
        helper.make_node("DequantizeLinear", [f"{name}.q", scale, zero], [target], name=f"{name}.dq"),
    ]


def gelu_nodes(form: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """GELU of "x" as "y", in the forms that exporters write."""
    n = helper.make_node
    numbers = {"root": f4(2**0.5), "one": f4(1), "half": f4(0.5), "three": f4(3), "cubic": f4(0.044715)}
    numbers["outer"] = f4((2 / np.pi) ** 0.5)
    if form == "Gelu":
        return [n("Gelu", ["x"], ["y"])], {}
    if form == "erf":
        nodes = [n("Div", ["x", "root"], ["a"]), n("Erf", ["a"], ["b"]), n("Add", ["b", "one"], ["c"])]
        nodes += [n("Mul", ["x", "c"], ["d"]), n("Mul", ["d", "half"], ["y"])]
    else:
        nodes = [n("Pow", ["x", "three"], ["a"]), n("Mul", ["a", "cubic"], ["b"]), n("Add", ["x", "b"], ["c"])]
        nodes += [n("Mul", ["c", "outer"], ["d"]), n("Tanh", ["d"], ["e"]), n("Add", ["e", "one"], ["f"])]
        nodes += [n("Mul", ["x", "half"], ["g"]), n("Mul", ["g", "f"], ["y"])]
    return nodes, numbers


def rounded(value: Fraction, low: int, high: int) -> int:
    """To the nearest integer, ties to even, clamped."""
    return min(max(round(value), low), high)


@pytest.mark.parametrize("form", ["Gelu", "erf", "tanh"])
def test_gelu_of_8_bits_however_it_is_written(form):
    x = np.arange(-128, 128, dtype=np.int8).reshape(4, 64)
    nodes, constants = gelu_nodes(form)
    nodes = [helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["x"]), *nodes, *qdq("out", "y", "sy", "zy", "z")]
    constants |= {"sx": f4(0.04), "zx": np.int8(3), "sy": f4(0.02), "zy": np.int8(-100)}
    package = ht.compile(graph_model(nodes, {"q": x}, ["z"], constants, opset=20), nonlinear="ibert")
    found = package.run({"q": x})["z"]
    scale, step = Fraction(float(f4(0.04))), Fraction(float(f4(0.02)))
    expected, off = [], 0.0
    for q in x.ravel().tolist():
        y, unit = paper_ibert.i_gelu(q - 3, scale)
        expected.append(rounded(y * unit / step, -28, 227))
        real = float(scale) * (q - 3)
        gate = math.tanh((2 / math.pi) ** 0.5 * (real + 0.044715 * real**3))
        gate = gate if form == "tanh" else math.erf(real / 2**0.5)
        off = max(off, abs(float(y * unit) - real / 2 * (1 + gate)) / float(step))
    np.testing.assert_array_equal(np.rint(found.ravel() / f4(0.02)), expected)
    assert package.verify(random=1).ok
    proof = package.prove()
    (arithmetic,), (distance,) = proof.nonlinear.values(), proof.distances.values()
    assert proof.ok and arithmetic == "I-BERT's i-GELU (A28)" and package.manifest["nonlinear"] == "ibert"
    # What the polynomial is off by at one of the integers; the model has a root of two in float32.
    assert abs(distance - off) < 1e-6


def test_an_erf_between_quantizers():
    x = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["x"]),
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["y"]),
        *qdq("out", "y", "sy", "zx", "z"),
    ]
    constants = {"sx": f4(0.04), "zx": np.int8(0), "sy": f4(1 / 127), "root": f4(2**0.5)}
    package = ht.compile(graph_model(nodes, {"q": x}, ["z"], constants), nonlinear="ibert")
    scale = Fraction(float(f4(0.04))) / Fraction(float(f4(2**0.5)))
    values = [paper_ibert.i_erf(q, scale) for q in x.ravel().tolist()]
    expected = [rounded(y * unit / Fraction(float(f4(1 / 127))), -128, 127) for y, unit in values]
    found = package.run({"q": x})["z"]
    np.testing.assert_array_equal(np.rint(found.ravel() * 127), expected)
    assert list(package.prove().nonlinear.values()) == ["I-BERT's i-erf (A28)"]


def test_gelu_of_a_products_sums_by_channel():
    """Each channel has its own scale and its bias, as an integer of that scale (A11)."""
    rng = np.random.default_rng(3)
    x, w = integers("int8", 5, 24), integers("int8", 24, 7, seed=1)
    scales = rng.uniform(1e-4, 2e-3, 7).astype(f4)
    bias = rng.integers(-9000, 9000, 7, dtype=np.int32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "sx", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["b"], axis=1),
        helper.make_node("MatMul", ["a", "b"], ["m"]),
        helper.make_node("DequantizeLinear", ["bias", "sb", "zb"], ["c"], axis=0),
        helper.make_node("Add", ["m", "c"], ["x"]),
        helper.make_node("Gelu", ["x"], ["y"]),
        *qdq("out", "y", "sy", "z", "out"),
    ]
    sx = f4(0.05)
    constants = {"sx": sx, "z": np.int8(0), "w": w, "sw": scales, "zw": np.zeros(7, np.int8), "sy": f4(0.03)}
    constants |= {"bias": bias, "sb": sx * scales, "zb": np.zeros(7, np.int32)}
    package = ht.compile(graph_model(nodes, {"q": x}, ["out"], constants, opset=20), nonlinear="ibert")
    sums = x.astype(np.int64) @ w + bias
    found = np.rint(package.run({"q": x})["out"] / f4(0.03))
    different = 0
    for (i, j), q in np.ndenumerate(sums):
        # The bias is on the grid of the float32 product of both scales, which is not their exact product.
        scale = Fraction(float(sx)) * Fraction(float(scales[j]))
        y, unit = paper_ibert.i_gelu(int(q), scale)
        different += found[i, j] != rounded(y * unit / Fraction(float(f4(0.03))), -128, 127)
    assert different == 0
    assert package.verify(random=2).ok and package.prove().ok


def test_softmax_and_normalization_of_8_bits():
    x = integers("int8", 6, 33)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "sx", "z"], ["a"]),
        helper.make_node("Softmax", ["a"], ["p"], axis=-1),
        *qdq("p", "p", "sp", "zu", "y"),
        helper.make_node("LayerNormalization", ["a", "gamma", "beta"], ["n"], epsilon=1e-5),
        *qdq("n", "n", "sn", "z", "t"),
    ]
    rng = np.random.default_rng(4)
    gamma, beta = rng.uniform(0.5, 2, 33).astype(f4), rng.normal(size=33).astype(f4)
    gamma[5] = 0
    constants = {"sx": f4(0.0625), "z": np.int8(0), "sp": f4(1 / 256), "zu": np.uint8(0), "sn": f4(0.0625)}
    constants |= {"gamma": gamma, "beta": beta}
    model = graph_model(nodes, {"q": x}, ["y", "t"], constants)
    package = ht.compile(model, nonlinear="ibert")
    outputs = package.run({"q": x})
    # 2^-4 becomes 2^-13 by a factor of 512.
    for row, y in zip(x.tolist(), outputs["y"], strict=True):
        p = paper_ibert.i_softmax([q * 512 for q in row], Fraction(1, 8192), 4)
        assert np.max(np.abs(y * 256 - [min(float(256 * v), 255) for v in p])) <= 0.5 + 2**-19
    root = 33**0.5
    for row, t in zip(x.tolist(), outputs["t"], strict=True):
        h = np.array(paper_ibert.i_layer_norm(row), np.float64)
        real = (h * root / 2**30 * gamma + beta) / 0.0625
        assert np.max(np.abs(t / f4(0.0625) - np.clip(real, -128, 127))) <= 0.5 + 1e-6
    assert package.verify(random=2).ok
    assert set(package.prove().nonlinear.values()) == {"I-BERT's i-softmax (A29)", "I-BERT's i-LayerNorm (A30)"}
    default = ht.compile(model)
    assert default.manifest["nonlinear"] == "real"
    assert set(default.prove().nonlinear.values()) == {"softmax (A17)", "normalization (A25)"}
    assert ht.inspect(model, nonlinear="ibert").verdict == ht.inspect(model).verdict


def test_another_arithmetic_is_refused():
    model = graph_model([helper.make_node("Gelu", ["x"], ["y"])], {"x": f4([1])}, ["y"], opset=20)
    for ask in (ht.compile, ht.inspect):
        with pytest.raises(UsageError, match="expected real or ibert; found hard"):
            ask(model, nonlinear="hard")


def test_a_scale_that_no_polynomial_holds_is_refused():
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]), helper.make_node("Gelu", ["x"], ["y"])]
    constants = {"s": f4(2**-31), "z": np.int8(0), "sy": f4(0.02)}
    nodes += qdq("out", "y", "sy", "z", "t")
    model = graph_model(nodes, {"q": np.zeros((1, 4), np.int8)}, ["t"], constants, opset=20)
    report = ht.inspect(model, nonlinear="ibert")
    assert "its input has a scale below 2^-30" in report.error
    with pytest.raises(ModelError) as caught:
        ht.compile(model, nonlinear="ibert")
    assert str(caught.value) == report.error


def test_what_no_integers_of_one_scale_stand_for():
    """A sum of two tensors goes onto a grid first; every result is as near the real formula as the proof says."""
    a, b = integers("int8", 6, 40), integers("int8", 6, 40, seed=1)
    real = a * float(f4(0.031)) + b * float(f4(0.017))
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "sa", "z"], ["x0"]),
        helper.make_node("DequantizeLinear", ["b", "sb", "z"], ["x1"]),
        helper.make_node("Add", ["x0", "x1"], ["x"]),
        helper.make_node("Softmax", ["x"], ["p"], axis=-1),
        helper.make_node("Gelu", ["x"], ["g"]),
        helper.make_node("LayerNormalization", ["x", "ones", "zeros"], ["n"], epsilon=1e-5),
        *(n for name in "pgn" for n in qdq(f"{name}.out", name, f"s{name}", "zu" if name == "p" else "z", f"{name}.y")),
    ]
    constants = {"sa": f4(0.031), "sb": f4(0.017), "z": np.int8(0), "zu": np.uint8(0), "ones": np.ones(40, f4)}
    steps = {"sp": f4(1 / 256), "sg": f4(0.05), "sn": f4(0.03125)}
    constants |= steps | {"zeros": np.zeros(40, f4)}
    model = graph_model(nodes, {"a": a, "b": b}, ["p.y", "g.y", "n.y"], constants, opset=20)
    package = ht.compile(model, nonlinear="ibert")
    assert package.verify(random=1).ok
    proof = package.prove()
    assert proof.ok and set(proof.nonlinear.values()) == {
        "I-BERT's i-GELU (A28)",
        "I-BERT's i-softmax (A29)",
        "I-BERT's i-LayerNorm (A30)",
    }
    e = np.exp(real - real.max(axis=1, keepdims=True))
    centred = real - real.mean(axis=1, keepdims=True)
    wanted = {
        "p": e / e.sum(axis=1, keepdims=True),
        "g": real / 2 * (1 + np.vectorize(math.erf)(real / 2**0.5)),
        "n": centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5),
    }
    outputs = package.run({"a": a, "b": b})
    for name, value in wanted.items():
        step = float(steps[f"s{name}"])
        low, high = (0, 255) if name == "p" else (-128, 127)
        off = np.abs(np.rint(outputs[f"{name}.y"] / step) - np.clip(value / step, low, high)).max()
        assert off <= 0.5 + proof.distances[f"{name}.out.q"] and off < 1.1

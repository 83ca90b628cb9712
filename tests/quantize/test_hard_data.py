"""What `quantize` writes compiles, whatever calibration saw: only zeros, constants, the least and the greatest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.quantize.ptq.observers import LEAST, OBSERVERS
from hawq_tvm.quantize.ptq.quantizer import Quantized, post_training
from hawq_tvm.quantize.ptq.recipe import Recipe

from .networks import FloatNet, images

Array = np.ndarray[Any, Any]
SHAPE = (4, 3, 8, 8)


def small_net() -> onnx.ModelProto:
    """Layers stem, a1 and fc, a sum and a mean."""
    g = FloatNet([1, 3, 8, 8])
    y = g.node("Relu", g.conv("x", 4, 3, 3, "stem", strides=[2, 2]))
    y = g.node("Relu", g.node("Add", g.conv(y, 4, 4, 1, "a1"), y))
    f = g.node("Flatten", g.node("GlobalAveragePool", y))
    return g.model(g.node("Gemm", f, g.random(5, 4), g.random(5, scale=0.1), name="fc", transB=1))


def quantized(model: onnx.ModelProto, x: Array, folder: Path, recipe: Recipe | None = None) -> Quantized:
    np.savez(folder / "in.npz", x=x)
    return post_training(model, folder / "in.npz", recipe or Recipe())


def scales(found: Quantized) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer if t.name.endswith("_scale")}


def changed(
    model: onnx.ModelProto, layer: str, weight: float | None = None, bias: float | None = None
) -> onnx.ModelProto:
    """With every weight of a layer multiplied, and its bias set."""
    node = next(n for n in model.graph.node if n.name == layer)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name == node.input[1] and weight is not None:
            with np.errstate(over="ignore"):
                tensor.CopyFrom(numpy_helper.from_array((value * np.float32(weight)).astype(np.float32), tensor.name))
        if len(node.input) > 2 and tensor.name == node.input[2] and bias is not None:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(value, bias), tensor.name))
    return model


def checked(found: Quantized, x: Array) -> None:
    """It compiles, every layer equals the reference, and every scale is a normal float32."""
    for name, value in scales(found).items():
        assert (value >= LEAST**2).all() and np.isfinite(value).all(), name
    package = ht.compile(found.model)
    package.verify([{"x": x[:1]}], random=1, seed=0).raise_if_mismatch()
    assert np.isfinite(next(iter(package.run({"x": x[:1]}).values()))).all()


DATA = {
    "zeros": np.zeros(SHAPE),
    "ones": np.ones(SHAPE),
    "minus one": -np.ones(SHAPE),
    "nearly constant": 1 + 1e-7 * images(4).clip(-2, 2),
    "denormal": 1e-42 * images(4),
    "least": np.full(SHAPE, 1e-45),
    "tiny": 1e-30 * images(4),
    "small": 1e-12 * images(4),
    "large": 1e12 * images(4),
    "one pixel": np.pad([[[[3.0]]]], ((0, 3), (0, 2), (0, 7), (0, 7))),
    "one image": images(1),
}


RECIPES = [
    Recipe(),
    Recipe(4, "percentile", symmetric=True, effort=5),
    Recipe("W4A8", "entropy", effort=5),
    Recipe(8, "minmax"),
]


@pytest.mark.parametrize(("kind", "recipe"), [(kind, RECIPES[i % 4]) for i, kind in enumerate(DATA)], ids=list(DATA))
def test_any_data(kind: str, recipe: Recipe, tmp_path: Path) -> None:
    x = DATA[kind].astype(np.float32)
    checked(quantized(small_net(), x, tmp_path, recipe), x)


LAYERS = {
    "dead stem": ("stem", None, -20.0),
    "dead before a sum": ("a1", None, -50.0),
    "zero weights": ("stem", 0.0, None),
    "all zero": ("stem", 0.0, 0.0),
    "denormal weights": ("a1", 1e-40, None),
    "tiny weights": ("stem", 1e-25, 0.0),
    "tiny weights beside a bias": ("a1", 1e-25, 5.0),
    "large weights": ("a1", 1e8, None),
    "large bias": ("stem", None, 1e9),
    "large negative bias": ("a1", None, -1e9),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_any_layer(kind: str, tmp_path: Path) -> None:
    layer, weight, bias = LAYERS[kind]
    x = images(4)
    checked(quantized(changed(small_net(), layer, weight, bias), x, tmp_path), x)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_dead_layer_has_the_scale_of_its_sums(observer: str, tmp_path: Path) -> None:
    """A ReLU that is never on gets the range of what it would let through, in which other data have numbers, too."""
    g = FloatNet([1, 3, 8, 8])
    y = g.node("Relu", g.node("Conv", "x", g.random(4, 3, 1, 1), g.constant([-20.0] * 4), name="dead"), name="relu")
    model = g.model(g.conv(y, 4, 4, 1, "last"))
    found = quantized(model, images(4), tmp_path, Recipe(observer=observer))
    scale = float(scales(found)["relu_1_scale"])
    assert 20 / 255 < scale < 60 / 255
    # On data where the layer is on, the integers follow the float network.
    bright = 200 * np.abs(images(1, seed=3))
    package = ht.compile(found.model)
    assert next(iter(package.run({"x": bright}).values())).std() > 0


def test_hardly_alive(tmp_path: Path) -> None:
    """A ReLU that lets through the last trace of one pixel: its range is far below one unit of the sums."""
    g = FloatNet([1, 3, 8, 8])
    weight = np.zeros((4, 3, 1, 1), np.float32)
    weight[:, 0] = 1.0
    y = g.node("Relu", g.node("Conv", "x", g.constant(weight), g.constant([0.0] * 4), name="first"))
    x = -np.abs(images(4)) - 1
    x[0, 0, 0, 0] = 1e-15
    checked(quantized(g.model(g.conv(y, 4, 4, 1, "last")), x, tmp_path), x)


def test_sums_that_cancel(tmp_path: Path) -> None:
    """A difference of equal layers is always zero, of numbers that are large."""
    g = FloatNet([1, 3, 8, 8])
    weight = g.random(4, 3, 1, 1)
    z = g.node("Sub", *(g.node("Conv", "x", weight, name=name) for name in ("first", "second")))
    x = 1e12 * images(4)
    checked(quantized(g.model(g.conv(z, 4, 4, 1, "last")), x, tmp_path), x)


def test_biases_that_are_added(tmp_path: Path) -> None:
    """The bias of a matrix product is an addition after it; it fits whatever the product's unit."""
    g = FloatNet([1, 3, 8, 8])
    f = g.node("Flatten", "x")
    y = g.node(
        "Add",
        g.node("MatMul", f, g.constant(np.full((192, 5), 1e-12)), name="first"),
        g.constant([1e6, -1e6, 1.0, 0.0, 3.0]),
    )
    x = 1e-6 * images(4)
    checked(quantized(g.model(g.node("MatMul", g.node("Relu", y), g.random(5, 5), name="last")), x, tmp_path), x)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "NaN or infinity"),
        (np.inf, "NaN or infinity"),
        (1e38, "x: reaches values .* no scale holds; expected below 1.15e\\+18; found 1e\\+38"),
    ],
)
def test_data_without_a_scale(value: float, message: str, tmp_path: Path) -> None:
    x = images(4)
    x[1, 2, 3, 4] = value
    with pytest.raises(InputError, match=message):
        quantized(small_net(), x, tmp_path)


@pytest.mark.parametrize(
    ("weight", "bias"), [(1e30, None), (np.inf, None), (np.nan, None), (None, 3e38), (None, -np.inf), (None, np.nan)]
)
def test_constants_without_a_scale(weight: float | None, bias: float | None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a1: has constants that no scale holds; expected finite numbers below 1.15e"):
        quantized(changed(small_net(), "a1", weight, bias), images(4), tmp_path)


def layer_norm(g: FloatNet, x: str, name: str) -> str:
    """LayerNormalization as PyTorch's exporter spells it below opset 17."""
    centred = g.node("Sub", x, g.node("ReduceMean", x, axes=[-1]), name=f"{name}/Sub")
    variance = g.node("ReduceMean", g.node("Pow", centred, g.constant(2.0)), axes=[-1])
    y = g.node("Div", centred, g.node("Sqrt", g.node("Add", variance, g.constant(1e-5))), name=f"{name}/Div")
    return g.node("Mul", y, g.random(16))


def in_rows(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).standard_normal((4, 5, 16)).astype(np.float32))
    return tmp_path / "in.npz"


def test_a_layer_norm_spelled_out_twice_compiles(tmp_path: Path) -> None:
    g = FloatNet([1, 5, 16])
    y = layer_norm(g, g.node("MatMul", "x", g.random(16, 16), name="a"), "one")
    y = layer_norm(g, g.node("MatMul", y, g.random(16, 16), name="b"), "two")
    model = g.model(g.node("MatMul", y, g.random(16, 16), name="c"))
    model.opset_import[0].version = 17
    assert ht.inspect(post_training(model, in_rows(tmp_path)).model).compilable


def test_what_has_no_integers_is_refused_before_calibration(tmp_path: Path) -> None:
    """Every operator is named; nothing is written, and only the first image has been looked at."""
    g = FloatNet([1, 5, 16])
    y = g.node("LogSoftmax", g.node("MatMul", "x", g.random(16, 16), name="a"), axis=-1, name="one")
    y = g.node("LogSoftmax", g.node("MatMul", y, g.random(16, 16), name="b"), axis=-1, name="two")
    model = g.model(g.node("MatMul", y, g.random(16, 16), name="c"))
    steps: list[Any] = []
    with pytest.raises(ModelError, match=r"cannot be quantized to integers alone.*one.*two"):
        post_training(model, in_rows(tmp_path), progress=steps.append)
    assert steps == []


def test_data_of_other_sizes(tmp_path: Path) -> None:
    """A network that leaves its size open but is made for one says so."""
    g = FloatNet([1, 3, "h", "w"])
    model = g.model(g.node("Gemm", g.node("Flatten", g.conv("x", 4, 3, 1, "first")), g.random(256, 5), name="fc"))
    with pytest.raises(
        ModelError,
        match=r"fc: Gemm cannot be computed on data of this shape; expected mat1.*found 1x324, 256x5; remedy: give",
    ):
        quantized(model, images(4, 9), tmp_path)
    checked(quantized(model, images(4), tmp_path), images(4))


def test_positions_that_a_table_does_not_have(tmp_path: Path) -> None:
    """As `run` says of a package's input."""
    g = FloatNet([1, 3, 4, 4])
    g.inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 3])]
    ids = g.node("Cast", "ids", to=TensorProto.INT32)
    model = g.model(g.node("MatMul", g.node("Gather", g.random(100, 8), ids), g.random(8, 5), name="fc"))
    for value in (100, -101):
        np.savez(tmp_path / "in.npz", ids=np.full((2, 1, 3), value)[:1].reshape(1, 3))
        with pytest.raises(InputError, match=rf"input ids: leaves .*; expected -100..99; found {value}..{value}"):
            post_training(model, tmp_path / "in.npz", Recipe())


def test_an_operator_without_a_float_form_stays_float_where_no_weights_are_behind_it(tmp_path: Path) -> None:
    g = FloatNet([1, 3, 8, 8])
    y = g.node("Flatten", g.node("Relu", g.conv("x", 4, 3, 3, "first")))
    best, _ = g.several("TopK", 2, y, g.constant([3], np.int64))
    assert quantized(g.model(g.node("Exp", best)), images(4), tmp_path).notes["float_tail"]["tensors"] == [y]
    inside = g.model(g.node("MatMul", best, g.random(3, 5), name="fc"))
    with pytest.raises(ModelError, match=r"TopK is not supported.*remedy: replace it by supported operators$"):
        quantized(inside, images(4), tmp_path)


@pytest.mark.parametrize(
    "bits, words",
    [
        ("W3A3", "--bits: .* activations of 4 or 8.*W3A3"),
        ("W5A8", "--bits: .* 2, 3, 4, 6 or 8 bits.*W5A8"),
        ("no.json", "--bits no.json: cannot be read.*No such file"),
    ],
)
def test_bits_that_cannot_be(bits: str, words: str, tmp_path: Path) -> None:
    g = FloatNet([1, 3, 8, 8])
    with pytest.raises(UsageError, match=words):
        quantized(g.model(g.conv("x", 4, 3, 3, "first")), images(4), tmp_path, Recipe(bits))

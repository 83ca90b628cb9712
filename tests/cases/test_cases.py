"""The table of cases: what each model of `builders.py` must give, by exact fractions of what the file holds, or the sentence that refuses it."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.errors import ModelError

from ..agreement import agreed
from ..models import TYPES
from . import builders as b

# What the compiler does not give yet: it takes time or memory without bound, hence it is not even run.
OPEN = pytest.mark.xfail(run=False, reason="unbounded time or memory")
UNBOUNDED = ("a constant doubled 40 times", "an input of 2^30 elements", "functions of 2^30 nodes")


def exact(value: float) -> Fraction:
    """A number as the file holds it, in float32."""
    return Fraction(float(np.float32(value)))


def real(integers: np.ndarray, scale: Fraction, zero: int = 0) -> np.ndarray:
    """(A1), in fractions."""
    return (integers.astype(object) - zero) * scale


def quantize(value: np.ndarray, scale: Fraction, zero: int, kind: str) -> np.ndarray:
    """Rounded half to even, as ONNX says, and clamped, in fractions."""
    _, low, high = TYPES[kind]
    steps = [min(max(round(Fraction(v) / scale) + zero, low), high) for v in value.ravel()]
    return np.array(steps, np.int64).reshape(value.shape)


@contextmanager
def bounded(seconds: float, gigabytes: float = 3) -> Iterator[None]:
    """Processor time and memory that a case may take; the time is checked afterwards, the memory is not to be had."""
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gigabytes * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < seconds


def made(model: onnx.ModelProto, **options: Any) -> Any:
    """The package, after `inspect` said yes; every layer verified, and the certificate made again."""
    assert agreed(model, **options) is None
    package = ht.compile(model, **options)
    package.verify(random=2).raise_if_mismatch()
    assert package.prove().ok
    return package


# -- means ---------------------------------------------------------------------------------------------------

MEANS: dict[str, tuple[Callable[[], onnx.ModelProto], int]] = {
    "ReduceMean of 6": (lambda: b.quantized("ReduceMean", [[1]], [1, 6, 16, 16], keepdims=0), 6),
    "ReduceMean of 12": (lambda: b.quantized("ReduceMean", [[1]], [1, 12, 16, 16], zero=4, keepdims=0), 12),
    "ReduceMean of 6, uint8": (lambda: b.quantized("ReduceMean", [[1]], [1, 6, 16, 16], kind="uint8", zero=100, keepdims=0), 6),
    "AveragePool of 1x6": (lambda: b.quantized("AveragePool", [], [1, 1, 256, 6], kernel_shape=[1, 6]), 6),
    "AveragePool of 2x3": (lambda: b.quantized("AveragePool", [], [1, 128, 2, 3], kernel_shape=[2, 3]), 6),
    "GlobalAveragePool of 6": (lambda: b.quantized("GlobalAveragePool", [], [1, 256, 1, 6]), 6),
    "GlobalAveragePool of 10": (lambda: b.quantized("GlobalAveragePool", [], [1, 256, 2, 5], zero=3), 10),
}


def mean_of(x: np.ndarray, model: onnx.ModelProto, count: int) -> np.ndarray:
    """The mean over the axis, or the last two axes, that hold `count` integers, which keeps scale and zero point."""
    node = next(n for n in model.graph.node if n.op_type.startswith(("Reduce", "Average", "Global")))
    sums = x.astype(np.int64).sum(axis=1 if node.op_type == "ReduceMean" else (2, 3))
    if node.op_type == "AveragePool" and x.shape[3] * x.shape[2] != count:
        sums = x.astype(np.int64).sum(axis=3)
    return np.array([round(Fraction(int(v), count)) for v in sums.ravel()])


@pytest.mark.parametrize("name", MEANS)
def test_means_at_ties(name: str) -> None:
    """Every sum of the operands' small integers, ties among them; the certificate counts what differs, and nothing does."""
    build, count = MEANS[name]
    model = build()
    package = made(model)
    (spec,) = package.inputs
    dtype, shape = np.dtype(spec["dtype"]), tuple(spec["shape"])
    zero = next(t.int32_data[0] for t in model.graph.initializer if t.data_type == TYPES[spec["type"]][0])
    x = np.random.default_rng(0).integers(-9, 10, shape) + zero
    got = package.run({"x": x.astype(dtype)})["y"]
    # The mean of q - z, rounded half to even, plus z: the zero point moves no tie.
    wanted = mean_of(x - zero, model, count) + zero
    np.testing.assert_array_equal(got.ravel(), wanted)
    assert package.prove().differing == 0


def test_means_of_a_small_network() -> None:
    model = b.mean_network()
    package = made(model)
    x = np.random.default_rng(1).normal(0, 6, (1, 4, 8, 8)).astype(np.float32)
    got = next(iter(package.run({"x": x}).values()))
    np.testing.assert_array_equal(got, mean_network_exactly(model, x))


def mean_network_exactly(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The network in fractions, but for the input's quantize: a division in float32, as (A2) says."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    weight = next(constants[n.input[0]] for n in model.graph.node if n.output[0] == conv.input[1]).astype(object)
    unit = exact(0.08)
    q = np.clip(np.rint(x / np.float32(0.08)) + 128, 0, 255).astype(np.int64)
    r = np.pad(real(q, unit, 128), [(0, 0), (0, 0), (1, 1), (1, 1)])
    y = np.empty(x.shape, object)
    for n, c, h, w in np.ndindex(*x.shape):
        y[n, c, h, w] = (r[n, :, h : h + 3, w : w + 3] * weight[c]).sum() * exact(0.5) + exact(constants[conv.input[2]][c])
    y = real(quantize(y, exact(0.64), 100, "uint8"), exact(0.64), 100)
    s = real(quantize(y + r[:, :, 1:-1, 1:-1], exact(0.16), 128, "uint8"), exact(0.16), 128)
    pooled = []
    for counts_padding in (False, True):
        p = np.empty((1, 4, 4, 4), object)
        for n, c, h, w in np.ndindex(*p.shape):
            window = s[n, c, max(0, 2 * h - 1) : 2 * h + 2, max(0, 2 * w - 1) : 2 * w + 2]
            p[n, c, h, w] = window.sum() / (9 if counts_padding else window.size)
        pooled.append(real(quantize(p, exact(0.16), 128, "uint8"), exact(0.16), 128))
    out = quantize(pooled[0] + pooled[1], exact(0.32), 128, "uint8") - 128
    return out.astype(np.float32) * np.float32(0.32)


# -- shapes, graphs without kernels --------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convolutions_over_one_dimension(op: str, outputs: int) -> None:
    package = made(b.conv1d(op, outputs))
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4)).astype(np.uint8)
    length = 3 if op == "Conv" else 5
    r, w = real(x, exact(0.02)), np.arange(6 * outputs).reshape((outputs, 3, 2) if op == "Conv" else (3, outputs, 2)).astype(object)
    y = np.full((2, outputs, length), Fraction(0), object)
    for n, o, i, t in np.ndindex(2, outputs, 3, length):
        for k in range(2):
            at, tap = (t + k, w[o, i, k]) if op == "Conv" else (t - k, w[i, o, k])
            y[n, o, t] += r[n, i, at] * tap * exact(0.01) if 0 <= at < 4 else 0
    y += real(np.arange(outputs)[:, None] * 100 + 7672, exact(0.0002))
    got = package.run({"x": x})["y"]
    assert got.shape == (2, outputs, length) == tuple(package.outputs[0]["shape"])
    np.testing.assert_array_equal(got, quantize(y, exact(0.03), 0, "uint8"))


@pytest.mark.parametrize("which", ["constant", "Identity", "Flatten", "integers", "both"])
def test_graphs_without_kernels(which: str) -> None:
    model = b.without_kernels(which)
    package = made(model)
    x = np.arange(6).reshape(2, 3).astype(np.uint8 if which == "integers" else np.float32)
    got = package.run({} if which == "constant" else {"x": x})
    constant = (np.arange(8) - 3).astype(np.float32) / 2
    wanted = {"constant": [constant], "both": [constant, x]}.get(which, [x])
    for name, array in zip([o.name for o in model.graph.output], wanted, strict=True):
        np.testing.assert_array_equal(got[name], array)


# -- time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Add", pytest.param("Max", marks=OPEN)])
@pytest.mark.parametrize("length", [14, 100])
def test_chains_that_read_a_value_twice(op: str, length: int) -> None:
    with bounded(seconds=20):
        package = made(b.doubled(length, op))
    x = np.array([[0, 1, 128, 255]], np.uint8)
    np.testing.assert_array_equal(package.run({"x": x})["y"], x)


def leaky(v: np.ndarray) -> np.ndarray:
    return np.where(v < 0, v * exact(0.1), v)


def test_leaky_relu_after_a_depthwise_convolution() -> None:
    model = b.leaky_depthwise(16)
    with bounded(seconds=40):
        package = made(model)
    constants = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    weight = next(a for a in constants if a.ndim == 4).astype(object)
    scales = next(a for a in constants if a.shape == (16,) and a.dtype == np.float32)
    x = np.random.default_rng(0).integers(0, 256, (1, 16, 8, 8)).astype(np.uint8)
    r = np.pad(real(x, exact(0.02), 128), [(0, 0), (0, 0), (1, 1), (1, 1)])
    y = np.empty(x.shape, object)
    for n, c, h, w in np.ndindex(*x.shape):
        y[n, c, h, w] = Fraction((r[n, c, h : h + 3, w : w + 3] * weight[c, 0]).sum()) * exact(scales[c])
    np.testing.assert_array_equal(package.run({"x": x})["y"], quantize(leaky(y), exact(0.031), 0, "uint8"))


def test_leaky_relu_after_a_matrix_product() -> None:
    """A hundred channels, one of whose thresholds took a second."""
    with bounded(seconds=60):
        made(b.leaky_gemm(100))


# -- constants outside the range -----------------------------------------------------------------------------


@pytest.mark.parametrize("value, kind, becomes", [(100.0, "int8", 63.5), (-1.0, "uint8", 0.0), (-1e30, "int8", -64.0), (0.24, "uint8", 0.0), (0.25, "int8", 0.0), (0.75, "uint8", 1.0)])
def test_padding_outside_the_range_saturates(value: float, kind: str, becomes: float) -> None:
    """As ONNX computes it: the padding is real until the next quantize, which rounds and saturates it."""
    model = b.padded(value, kind)
    package = made(model)
    x = np.random.default_rng(0).integers(0, 60, (1, 2, 4, 4)).astype(np.float32)
    wanted = np.pad(x, [(0, 0), (0, 1), (1, 0), (0, 1)], constant_values=becomes)
    np.testing.assert_array_equal(next(iter(package.run({"x": x}).values())), wanted)


def test_a_linear_resize_of_uint8_to_uint16() -> None:
    package = made(b.resized())
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 2, 6)).astype(np.uint8)
    y = np.empty((1, 3, 4, 10), object)
    for _, c, i, j in np.ndindex(*y.shape):
        h, w = (min(max(Fraction(2 * p + 1, 2) * Fraction(size, to) - Fraction(1, 2), 0), size - 1) for p, size, to in ((i, 2, 4), (j, 6, 10)))
        y[0, c, i, j] = sum(
            int(x[0, c, k, m]) * max(0, 1 - abs(h - k)) * max(0, 1 - abs(w - m)) for k in range(2) for m in range(6)
        ) * exact(0.26619494)  # fmt: skip
    np.testing.assert_array_equal(package.run({"x": x})["y"], quantize(y, exact(0.00048828), 0, "uint16"))
    assert not package.prove().not_enumerated


# -- float networks ------------------------------------------------------------------------------------------


def quantized_file(model: onnx.ModelProto, tmp_path: Path, *options: str) -> Path:
    """What the command `quantize` makes of a float model and four calibration inputs."""
    onnx.save(model, str(tmp_path / "float.onnx"))
    rng = np.random.default_rng(0)
    shape = (4, 3, 8, 8) if not options else (4, 3, 48, 192)
    np.savez(tmp_path / "calib.npz", x=rng.normal(size=shape).astype(np.float32))
    out = tmp_path / "quantized.onnx"
    assert main(["quantize", str(tmp_path / "float.onnx"), "--calib", str(tmp_path / "calib.npz"), "-o", str(out), *options]) == 0
    return out


def test_a_layer_that_is_never_on(tmp_path: Path) -> None:
    path = quantized_file(b.dead_layer(), tmp_path)
    package = made(onnx.load(str(path)), shapes={"x": (1, 3, 8, 8)})
    scales = [q for t in onnx.load(str(path)).graph.initializer if "scale" in t.name for q in np.ravel(onnx.numpy_helper.to_array(t))]
    assert all(1e-12 < s < 1e6 for s in scales)
    assert package.outputs[0]["shape"] == [1, 5]


def test_a_batch_of_minus_one(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(b.batch_minus_one(), str(path))
    shape = ["--shape", "x=1x3x48x192"]
    with pytest.raises(ModelError, match=re.escape("pass --shape x=1x3x224x224")):
        ht.compile(path)
    quantized = quantized_file(b.batch_minus_one(), tmp_path, *shape)
    assert main(["inspect", str(quantized), *shape]) == 0
    assert main(["compile", str(quantized), "-o", str(tmp_path / "p.hawq"), "--quiet", *shape]) == 0
    package = ht.load(tmp_path / "p.hawq")
    assert (package.inputs[0]["shape"], package.outputs[0]["shape"]) == ([1, 3, 48, 192], [1, 8])
    package.verify(random=1).raise_if_mismatch()


# -- attacks -------------------------------------------------------------------------------------------------

# The model, and what names the layer in the sentence.
ATTACKS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "NaN": (lambda: b.added_constant(float("nan")), "add_"), "infinity": (lambda: b.added_constant(float("inf")), "add_"),
    "minus infinity": (lambda: b.added_constant(-float("inf")), "add_"),
    "a constant doubled 40 times": (lambda: b.doubled_constant(40), "concat_"),
    "an input of 2^30 elements": (lambda: b.between(lambda g, x: g.node("Relu", [x]), (2**30,)), "input 'x'"),
    "an input of 2^60 elements": (lambda: b.between(lambda g, x: g.node("Relu", [x]), (2**20, 2**20, 2**20)), "input 'x'"),
    "functions of 2^30 nodes": (lambda: b.nested_functions(30), ""),
    "a bias of 3e38": (lambda: b.float_bias(3e38, 1e30), "gemm_"), "a bias of 1e20": (lambda: b.quantized_bias(1e20), "conv_"),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=OPEN if n in UNBOUNDED else ()) for n in ATTACKS])
def test_attacks_are_refused_in_a_sentence_or_computed(name: str) -> None:
    """Before memory or time is taken, by `inspect` and `compile` alike; or the model is an odd one, and its layers are right."""
    build, layer = ATTACKS[name]
    model = build()
    with bounded(seconds=20):
        error = agreed(model)
    if error is None:
        made(model)
    else:
        assert layer in str(error)


@pytest.mark.parametrize("depth", [2, 6])
def test_functions_of_functions(depth: int) -> None:
    with bounded(seconds=20):
        package = made(b.nested_functions(depth))
    x = np.linspace(-1, 8, 64).astype(np.float32).reshape(1, 4, 4, 4)
    ours = next(iter(package.run({"x": x}).values()))
    np.testing.assert_array_equal(ours, np.float32(0.05) * (np.clip(np.rint(x / np.float32(0.05)) + 7, 7, 255) - 7))


@pytest.mark.parametrize("step", [-5, -(2**31), -(2**63)])
def test_steps_beyond_the_end(step: int) -> None:
    package = made(b.sliced(step))
    x = np.arange(64).astype(np.float32).reshape(1, 4, 4, 4) / 20
    np.testing.assert_allclose(next(iter(package.run({"x": x}).values())), x[:, -1:], atol=0.026)


def test_names_with_control_characters_are_printed_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, name = b.escape_sequences()
    path, package = tmp_path / "m.onnx", tmp_path / "p.hawq"
    onnx.save(model, str(path))
    for command in (["inspect", path], ["compile", path, "-o", package], ["info", package], ["verify", package], ["prove", package], ["inspect", path, "--json"]):
        assert main([str(c) for c in command]) == 0
        printed = "".join(capfd.readouterr())
        assert not set(map(chr, [*range(10), *range(11, 32), 127])) & set(printed), command
    assert main(["compile", str(path), "-o", str(package), "--shape", f"x{name}=1x2"]) != 0
    assert "\x1b" not in "".join(capfd.readouterr())

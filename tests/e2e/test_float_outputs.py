"""Outputs that nothing quantizes: float32 of s (q - z) + beta, fractions included; and a flag that changes nothing
where it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht

from ..frontend.onnx_models import onnxruntime
from ..models import Graph, float_output

SX, SW = np.float32(0.0213), np.float32(0.0107)
UNIT = np.float32(SX * SW)
BETA = np.array([0.4, -0.4, 0.0, 1.0, 7.7, -3.2, 1e-3, 5e4], np.float32) * UNIT


def conv(g: Graph, bias: np.ndarray, groups: int = 1) -> tuple[str, np.ndarray]:
    """A convolution of 8 channels, the first two of equal weights, with a float bias; the sums' weights beside it."""
    x = g.qdq(g.input("x", [2, 8, 5, 5]), SX, 128)
    w = g.rng.integers(-127, 127, (8, 8 // groups, 3, 3), endpoint=True)
    w[1] = w[0]
    weight = g.dq(g.constant(w, TensorProto.INT8), SW, 0, "int8")
    return g.conv(x, weight, g.constant(bias, TensorProto.FLOAT), group=groups), w


def sums(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The integer sums of `conv` for a float input."""
    q = np.clip(np.rint(x / SX), -128, 127).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(q, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w)


def check_nearest(found: np.ndarray, exact: np.ndarray) -> None:
    """Each is the float32 nearest to an exact rational, but for what float64 loses of a sum on the way (A1a)."""
    assert found.dtype == np.float32
    for y, wanted in zip(found.ravel(), exact.ravel(), strict=True):
        assert abs(Fraction(float(y)) - wanted) <= Fraction(float(np.spacing(abs(y)))) * (
            Fraction(1, 2) + Fraction(1, 2**16)
        ), (y, float(wanted))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1])
def test_a_float_bias_keeps_its_fraction(relu: bool, groups: int) -> None:
    g = Graph(3)
    y, w = conv(g, BETA, groups)
    model = g.model([float_output(g.node("Relu", [y]) if relu else y)])
    package = ht.compile(model)
    feed = {"x": np.random.default_rng(1).normal(0, 1.5, (2, 8, 5, 5)).astype(np.float32)}
    (found,) = package.run(feed).values()
    scale, beta = Fraction(float(SX)) * Fraction(float(SW)), [Fraction(float(b)) for b in BETA]
    exact = (
        np.array([scale * int(a) for a in sums(feed["x"], w).ravel()], object).reshape(found.shape)
        + np.array(beta, object)[:, None, None]
    )
    check_nearest(found, np.maximum(exact, 0) if relu else exact)
    if not relu:
        assert np.all(found[:, 0] > found[:, 1])  # equal sums, biases of +0.4 and -0.4 units
    np.testing.assert_allclose(found, onnxruntime(model, feed)[package.outputs[0].name], rtol=1e-5, atol=1e-5)
    for way in ("vm", "c"):
        package.verify(feed, random=2, through=way).raise_if_mismatch()
    assert package.prove().ok


def test_a_bias_on_the_grid_stays_32_bits_wide() -> None:
    """A whole number of units is added in int32, as ever: no wider integers, no other scale."""
    g = Graph(3)
    x = g.qdq(g.input("x", [2, 8, 5, 5]), 0.5, 128)
    y = g.conv(
        x,
        g.weight([8, 8, 3, 3], axis=None, scale=0.25),
        g.constant(np.arange(-4, 4, dtype=np.float32) * 0.125, TensorProto.FLOAT),
    )
    package = ht.compile(g.model([float_output(y)]))
    assert "int64" not in package.graph.script() and package.outputs[0].quantization.scale == (0.125,)


def test_a_constant_added_to_a_quantized_output() -> None:
    """No sum of products: the output's own integers and a constant off their grid, one per channel."""
    g = Graph(4)
    x = g.dq(g.input("x", [2, 3, 4], TensorProto.UINT8), 0.1, 7)
    added = np.array([[0.04], [-0.04], [1e6]], np.float32)
    package = ht.compile(g.model([float_output(g.node("Add", [x, g.constant(added, TensorProto.FLOAT)]))]))
    q = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    exact = np.array([Fraction(float(np.float32(0.1))) * (int(v) - 7) for v in q.ravel()], object).reshape(q.shape)
    (found,) = package.run({"x": q}).values()
    check_nearest(found, exact + np.array([[Fraction(float(b[0]))] for b in added], object))
    package.verify(random=2).raise_if_mismatch()


def classifier(g: Graph) -> str:
    """A convolution and a Gemm with float biases, pooled between; logits in float."""
    y, _ = conv(g, BETA)
    z = g.qdq(g.node("GlobalAveragePool", [g.qdq(g.node("Relu", [y]), 0.05, 0)]), 0.04, 0)
    return g.node(
        "Gemm",
        [
            g.node("Flatten", [z]),
            g.weight([10, 8], axis=0),
            g.constant(g.rng.normal(0, 0.1, 10).astype(np.float32), TensorProto.FLOAT),
        ],
        transB=1,
    )


def pooled(g: Graph) -> str:
    return g.node("MaxPool", [conv(g, BETA)[0]], kernel_shape=[2, 2])


def averaged(g: Graph) -> str:
    return g.node("ReduceMean", [conv(g, BETA)[0], g.constant([2, 3], TensorProto.INT64)], keepdims=0)


def moved(g: Graph) -> str:
    return g.node("Transpose", [g.node("Relu", [conv(g, BETA)[0]])], perm=[0, 2, 3, 1])


def shifted(g: Graph) -> str:
    return g.node(
        "Add",
        [
            g.node("Mul", [conv(g, BETA)[0], g.constant(np.float32(3), TensorProto.FLOAT)]),
            g.constant(np.float32(0.1), TensorProto.FLOAT),
        ],
    )


def quantized(g: Graph) -> str:
    return g.qdq(conv(g, BETA)[0], 0.05, 100)


NETWORKS: list[Callable[[Graph], str]] = [classifier, pooled, averaged, moved, shifted, quantized]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_the_flag_changes_nothing_where_it_is_not_needed(network: Callable[[Graph], str]) -> None:
    """Not one byte of the package."""
    model = g.model([float_output(network(g))]) if (g := Graph(3)) else None
    without, asked = ht.compile(model), ht.compile(model, allow_float_tail=True)
    assert without.manifest == asked.manifest and without._files == asked._files
    assert not asked.manifest["float_tail"]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_a_softmax_behind_reads_the_same_integers(network: Callable[[Graph], str]) -> None:
    """Bit for bit what the network without it gives, in a float tail and as integers."""

    def made(tail: bool) -> onnx.ModelProto:
        g = Graph(3)
        y = network(g)
        return g.model([float_output(y), float_output(g.node("Softmax", [y]))] if tail else [float_output(y)])

    whole, cut, integers = (
        ht.compile(made(True), allow_float_tail=True),
        ht.compile(made(False)),
        ht.compile(made(True)),
    )
    feed = cut.random_inputs(1, 5)[0]
    (alone,), (logits, wanted), (again, found) = (p.run(feed).values() for p in (cut, whole, integers))
    np.testing.assert_array_equal(logits, alone, strict=True)
    np.testing.assert_array_equal(again, alone, strict=True)
    assert kernels(whole) == kernels(cut) and integers.manifest["float_tail"] == []
    (bound,) = integers.prove().outputs.values()
    assert bound < 1e-5 and np.abs(found - wanted).max() < bound + 2.0**-21  # what a float32 softmax loses
    for package in (whole, integers):
        package.verify(random=2).raise_if_mismatch()


def kernels(package: ht.Package) -> list[tuple[Any, ...]]:
    """Every kernel's rule and name, those of a float tail left out."""
    return sorted(
        (r["rule"], r["function"]) for r in package.report() if r["layer"] not in package.manifest["float_tail"]
    )

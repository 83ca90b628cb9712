"""Graphs of quotients drawn at random, beside fractions and ONNX Runtime: where two differ it is told who is wrong.

The package is the real formula, rounded at each quantize. ONNX Runtime computes in float32, and so it is the one that
differs, next to a tie of some quantize on the way and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.core.threshold_search import round_exactly

from ..frontend.onnx_models import onnxruntime as simulated
from ..models import TYPES, Graph

ROWS, LENGTH, KINDS = 4, 128, ("uint8", "int8", "int16", "uint16")
Row = list[Fraction | None]  # None: divided by 0


def near_a_tie(q: Fraction) -> bool:
    """Whether a few roundings of float32 can bring q to the other side of k + 1/2."""
    return abs(q - (q.__floor__() + Fraction(1, 2))) <= abs(q) / 2**22 + Fraction(1, 2**24)


@dataclass
class Drawn:
    """A graph that is being drawn, what it is fed, and where one of its quantizes is near a tie."""

    rng: np.random.Generator
    graph: Graph = field(default_factory=lambda: Graph(opset=21))
    feed: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    ties: list[bool] = field(default_factory=lambda: [False] * (ROWS * LENGTH))

    def input(self, name: str) -> tuple[str, Row]:
        """An input of any type, half of the time with a scale for each row."""
        kind = KINDS[self.rng.integers(4)]
        proto, low, high = TYPES[kind]
        zero = int(low if self.rng.random() < 0.5 else self.rng.integers(low, high))
        scales: Any = np.float32(np.exp(self.rng.uniform(-5, 0)) / (256 if "16" in kind else 1))
        if self.rng.random() < 0.5:
            scales = (scales * self.rng.uniform(0.3, 3, ROWS)).astype(np.float32)
        values = self.rng.integers(low, high, (ROWS, LENGTH), endpoint=True)
        values[:, :8] = np.clip(zero + self.rng.integers(-8, 9, (ROWS, 8)), low, high)
        self.feed[name] = values.astype(kind)
        x = self.graph.input(name, [ROWS, LENGTH], proto)
        if scales.ndim:
            y = self.graph.dq(x, scales, np.full(ROWS, zero), kind, axis=0)
        else:
            y = self.graph.dq(x, scales, zero, kind)
        factors = [Fraction(float(s)) for s in np.broadcast_to(scales, ROWS)]
        return y, [int(v - zero) * f for row, f in zip(values, factors, strict=True) for v in row]

    def node(self, op: str, *operands: tuple[str, Row]) -> tuple[str, Row]:
        known: dict[str, Callable[..., Fraction | None]] = {
            "Div": lambda a, b: a / b if b else None,
            "Mul": lambda a, b: a * b,
            "Neg": lambda a: -a,
        }
        rows = zip(*(values for _, values in operands), strict=True)
        return self.graph.node(op, [name for name, _ in operands]), [
            None if None in one else known[op](*one) for one in rows
        ]

    def sum(self, x: tuple[str, Row]) -> tuple[str, Row]:
        """Of every row."""
        y = self.graph.node("ReduceSum", [x[0], self.graph.constant([1], TensorProto.INT64)], keepdims=1)
        sums = [sum(filter(None, x[1][i * LENGTH : (i + 1) * LENGTH]), Fraction(0)) for i in range(ROWS)]
        return y, [s for s in sums for _ in range(LENGTH)]

    def quantized(self, x: tuple[str, Row], kind: str = "int8", last: bool = False) -> tuple[str, Row]:
        """By a scale that some values are beyond; last: as integers."""
        low, high = TYPES[kind][1:]
        sizes = sorted(abs(v) for v in x[1] if v is not None)
        scale = np.float32(2 * sizes[int(0.9 * len(sizes))] / (high - low))
        zero, step = int(self.rng.integers(low, high, endpoint=True)), Fraction(float(scale))
        made: Row = []
        for i, v in enumerate(x[1]):
            self.ties[i] |= v is not None and near_a_tie(v / step)
            number = None if v is None else min(max(round_exactly(v / step, "half_even") + zero, low), high)
            made.append(None if number is None else Fraction(number) if last else (number - zero) * step)
        return (self.graph.q if last else self.graph.qdq)(x[0], scale, zero, kind), made


FORMS: dict[str, Callable[[Drawn], tuple[str, Row]]] = {
    "a / b": lambda d: d.node("Div", d.input("a"), d.input("b")),
    "-a / b": lambda d: d.node("Div", d.node("Neg", d.input("a")), d.input("b")),
    "(a c) / b": lambda d: d.node("Div", d.node("Mul", d.input("a"), d.input("c")), d.input("b")),
    "sum(a) / b": lambda d: d.node("Div", d.sum(d.input("a")), d.input("b")),
    "a / sum(b)": lambda d: d.node("Div", d.input("a"), d.sum(d.input("b"))),
    "q(a / b) / c": lambda d: d.node("Div", d.quantized(d.node("Div", d.input("a"), d.input("b"))), d.input("c")),
    "a / q(b c)": lambda d: d.node("Div", d.input("a"), d.quantized(d.node("Mul", d.input("b"), d.input("c")))),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_difference_is_float32s(form: str, seed: int) -> None:
    drawn = Drawn(np.random.default_rng([seed, list(FORMS).index(form)]))
    kind = KINDS[drawn.rng.integers(3)]
    y, wanted = drawn.quantized(FORMS[form](drawn), kind, last=True)
    model = drawn.graph.model([(y, TYPES[kind][0])])
    (got,), (theirs,) = ht.compile(model).run(drawn.feed).values(), simulated(model, drawn.feed).values()
    for ours, other, exact, tie in zip(got.ravel(), theirs.ravel(), wanted, drawn.ties, strict=True):
        if exact is None:
            assert ours == other
        else:
            assert ours == exact and (other == exact or tie)

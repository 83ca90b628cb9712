"""A small transformer block as quantizers write it, for every processor's tests."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from .models import Graph, float_output

HEADS, WORDS, WIDTH = 2, 9, 32


def block(wide: bool, kind: str = "uint8") -> onnx.ModelProto:
    """LayerNorm, attention of two heads, residual sum, LayerNorm, GELU: each of our operators for transformers.

    wide: scores without a quantize under a mask (A24), GELU of sums (A31) and a fixed-point residual stream (A26);
    else a quantize behind each.  kind: of the tensors between layers.
    """
    g = Graph(3)
    zero = 117 if kind == "uint8" else -9

    def q(x: str, scale: float) -> str:
        return g.qdq(x, np.float32(scale), zero, kind)

    def linear(x: str, inputs: int, outputs: int) -> str:
        bias = g.constant(g.rng.normal(0, 0.3, outputs).astype(np.float32), TensorProto.FLOAT)
        return g.node("Add", [g.node("MatMul", [x, g.weight([inputs, outputs], axis=1, scale=0.004)]), bias])

    def normed(x: str) -> str:
        numbers = (g.rng.uniform(0.5, 1.5, WIDTH), g.rng.normal(0, 0.2, WIDTH))
        own = [g.constant(n.astype(np.float32), TensorProto.FLOAT) for n in numbers]
        return g.node("LayerNormalization", [x, *own], axis=-1, epsilon=1e-5)

    def heads(x: str, axes: list[int]) -> str:
        shape = g.constant([1, WORDS, HEADS, WIDTH // HEADS], TensorProto.INT64)
        return g.node("Transpose", [g.node("Reshape", [x, shape])], perm=axes)

    x = q(g.input("x", [1, WORDS, WIDTH]), 0.021)
    y = q(normed(x), 0.02)
    query, key, value = (q(linear(y, WIDTH, WIDTH), 0.03) for _ in range(3))
    scores = g.node("MatMul", [heads(query, [0, 2, 1, 3]), heads(key, [0, 2, 3, 1])])
    scores = g.node("Mul", [scores if wide else q(scores, 0.06), g.constant(np.float32(0.25), TensorProto.FLOAT, ())])
    if wide:
        mask = np.where(np.tri(WORDS, dtype=bool), 0, np.finfo(np.float32).min).astype(np.float32)
        scores = g.node("Add", [scores, g.constant(mask[None, None], TensorProto.FLOAT)])
    else:
        scores = q(scores, 0.04)
    p = g.qdq(g.node("Softmax", [scores], axis=-1), np.float32(1 / 256))
    context = q(g.node("MatMul", [p, heads(value, [0, 2, 1, 3])]), 0.02)
    flat = g.constant([1, WORDS, WIDTH], TensorProto.INT64)
    context = g.node("Reshape", [g.node("Transpose", [context], perm=[0, 2, 1, 3]), flat])
    x = g.node("Add", [linear(context, WIDTH, WIDTH), x])
    x = x if wide else q(x, 0.03)
    hidden = linear(q(normed(x), 0.02), WIDTH, 2 * WIDTH)
    hidden = q(g.node("Gelu", [hidden if wide else q(hidden, 0.03)]), 0.02)
    return g.model([float_output(q(g.node("Add", [linear(hidden, 2 * WIDTH, WIDTH), x]), 0.05))])

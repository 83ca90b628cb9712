"""The whole encoder in Python's integers and Fractions: the paper's algorithms between the modules' quantizers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from ... import paper_ibert
from .model import HEADS, HIDDEN, LAYERS, PADDING

Row = list[int]


def f(value: np.float32) -> Fraction:
    """The number that a float is."""
    return Fraction(float(value))


def clamped(value: int, bits: int) -> int:
    """In two's complement of so many bits."""
    return min(max(value, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)


class Encoder:
    """One sentence through the encoder; each layer's integers are a list of rows, one for each token."""

    def __init__(self, tensors: dict[str, np.ndarray], prefix: str = "ibert.") -> None:
        self.tensors, self.prefix = tensors, prefix

    def of(self, name: str) -> np.ndarray:
        return self.tensors[self.prefix + name]

    def scale(self, name: str, bits: int) -> np.float32:
        """symmetric_linear_quantization_params."""
        most = max(abs(self.of(f"{name}.x_min")[0]), abs(self.of(f"{name}.x_max")[0]))
        return np.float32(most / np.float32(2 ** (bits - 1) - 1))

    def weight(self, name: str, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
        """SymmetricQuantFunction of 8 bits."""
        w = self.of(f"{name}.weight")
        scale = (np.abs(w).max(axis=axis, keepdims=True) / np.float32(127)).astype(np.float32)
        return np.clip(np.rint(np.float32(1) / scale * w), -127, 126).astype(np.int64), scale.ravel()

    def run(self, ids: list[int], mask: list[int]) -> np.ndarray:
        """The integers of the last quantizer, and its scale."""
        hidden, scale = self.embedded(ids)
        for i in range(LAYERS):
            hidden, scale = self.layer(f"encoder.layer.{i}", hidden, scale, mask)
        return np.array(hidden, np.float32) * scale

    def embedded(self, ids: list[int]) -> tuple[list[Row], np.float32]:
        s = self.scale("embeddings.embeddings_act1", 16)
        tables = [self.weight(f"embeddings.{n}_embeddings", None) for n in ("word", "token_type", "position")]
        rows = []
        for place, token in enumerate(ids):
            chosen = zip(tables, (token, 0, PADDING + 1 + place), strict=True)
            word, kind, position = ([round(int(v) * f(own[0]) / f(s)) for v in t[row]] for (t, own), row in chosen)
            first = [clamped(a + b, 16) for a, b in zip(word, kind, strict=True)]
            rows.append([clamped(a + b, 16) for a, b in zip(first, position, strict=True)])
        return self.normalized("embeddings.LayerNorm", rows, "embeddings.output_activation")

    def normalized(self, name: str, rows: list[Row], act: str) -> tuple[list[Row], np.float32]:
        gamma, beta = self.of(f"{name}.weight"), self.of(f"{name}.bias")
        unit, s = Fraction(math.isqrt(HIDDEN << 200), 1 << 130), self.scale(act, 8)
        made = []
        for row in rows:
            h = paper_ibert.i_layer_norm(row)
            real = [v * unit * f(g) + f(b) for v, g, b in zip(h, gamma, beta, strict=True)]
            made.append([clamped(round(v / f(s)), 8) for v in real])
        return made, s

    def linear(self, name: str, rows: list[Row], scale: np.float32) -> tuple[list[Row], list[Fraction]]:
        """Sums with the bias of the simulation, and the exact scale of every output."""
        w, own = self.weight(name, 1)
        bias = np.rint(np.float32(1) / (own * scale) * self.of(f"{name}.bias")).astype(np.int64)
        sums = (np.array(rows, np.int64) @ w.T + bias).tolist()
        return sums, [f(v) * f(scale) for v in own]

    def act(self, name: str, rows: list[Row], scales: list[Fraction], bits: int = 8) -> tuple[list[Row], np.float32]:
        s = self.scale(name, bits)
        return [[clamped(round(q * r / f(s)), bits) for q, r in zip(row, scales, strict=True)] for row in rows], s

    def layer(self, name: str, hidden: list[Row], scale: np.float32, mask: list[int]) -> tuple[list[Row], np.float32]:
        context, s = self.attention(f"{name}.attention.self", hidden, scale, mask)
        attended, s = self.output(f"{name}.attention.output", context, s, hidden, scale)
        attended, s = self.act(f"{name}.pre_intermediate_act", attended, [f(s)] * HIDDEN)
        sums, scales = self.linear(f"{name}.intermediate.dense", attended, s)
        dropped = self.dropped(f"{name}.intermediate.dense", scales, s)
        found = [[paper_ibert.i_gelu(q, r, dropped) for q, r in zip(row, scales, strict=True)] for row in sums]
        units = [unit for _, unit in found[0]]
        inner, t = self.act(f"{name}.intermediate.output_activation", [[q for q, _ in row] for row in found], units)
        inner, t = self.act(f"{name}.pre_output_act", inner, [f(t)] * len(inner[0]))
        return self.output(f"{name}.output", inner, t, attended, s)

    def dropped(self, name: str, scales: list[Fraction], scale: np.float32) -> int:
        """t of (A28): by the most that any sum of these weights and its product can be."""
        w, own = self.weight(name, 1)
        bias = np.rint(np.float32(1) / (own * scale) * self.of(f"{name}.bias")).astype(np.int64)
        widest = 0
        for row, b, s in zip(w.tolist(), bias.tolist(), scales, strict=True):
            high = b + sum(max(-128 * v, 127 * v) for v in row)
            low = b + sum(min(-128 * v, 127 * v) for v in row)
            widest = max(widest, max(high, -low) * (-2 * math.floor(-2 / (Fraction("0.2888") * s**2)) + 4))
        return max(0, widest.bit_length() - 42)

    def output(
        self, name: str, rows: list[Row], scale: np.float32, residual: list[Row], residual_scale: np.float32
    ) -> tuple[list[Row], np.float32]:
        """Both branches of the sum rounded to 22 bits on their own, then LayerNorm."""
        sums, scales = self.linear(f"{name}.dense", rows, scale)
        s = f(self.scale(f"{name}.ln_input_act", 22))
        total = []
        for a, b in zip(sums, residual, strict=True):
            branches = [
                round(q * r / s) + round(x * f(residual_scale) / s) for q, r, x in zip(a, scales, b, strict=True)
            ]
            total.append([clamped(v, 22) for v in branches])
        return self.normalized(f"{name}.LayerNorm", total, f"{name}.output_activation")

    def attention(
        self, name: str, hidden: list[Row], scale: np.float32, mask: list[int]
    ) -> tuple[list[Row], np.float32]:
        parts, scales = {}, {}
        for part in ("query", "key", "value"):
            sums, own = self.linear(f"{name}.{part}", hidden, scale)
            parts[part], scales[part] = self.act(f"{name}.{part}_activation", sums, own)
        depth = HIDDEN // HEADS
        finer = Fraction(float(np.float64(scales["key"]) / math.sqrt(depth)))
        unit = f(scales["query"]) * finer
        left = 0
        while unit > 2**left * Fraction(1, 2**13):
            left += 1
        unit /= 2**left
        context = [[0] * HIDDEN for _ in hidden]
        for head in range(HEADS):
            own = slice(head * depth, (head + 1) * depth)
            for i, q in enumerate(parts["query"]):
                scores = [2**left * sum(a * b for a, b in zip(q[own], k[own], strict=True)) for k in parts["key"]]
                p = self.probabilities(scores, mask, unit)
                for j in range(own.start, own.stop):
                    context[i][j] = sum(w * v[j] for w, v in zip(p, parts["value"], strict=True))
        return self.act(f"{name}.output_activation", context, [f(scales["value"]) / 256] * HIDDEN)

    def probabilities(self, scores: Row, mask: list[int], unit: Fraction) -> Row:
        """Of the tokens that are shown; the quotient in 8 bits, rounded down, as (A17) takes it."""
        top = max(s for s, m in zip(scores, mask, strict=True) if m)
        largest = (math.floor(Fraction("1.353") / unit)) ** 2
        largest += math.floor(Fraction("0.344") / (Fraction("0.3585") * unit**2))
        up = 31 - largest.bit_length()
        e = [paper_ibert.i_exp(s - top, unit, up)[0] if m else 0 for s, m in zip(scores, mask, strict=True)]
        h = sum(e).bit_length()
        multiplier, shift = 2**29, 21
        reciprocal = 2**31 * multiplier // (sum(e) >> (h - 31))
        return [min(v * reciprocal >> (shift + h), 255) for v in e]

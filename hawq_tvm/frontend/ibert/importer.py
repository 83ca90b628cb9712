"""A checked encoder written as an ANNOTATED module, operator by operator as its modules compute with quant_mode.

Where Hugging Face's simulation leaves the paper, the paper is followed: every layer reads its input with that tensor's
own scale (the encoder hands the embedding's scale to all), i-GELU takes the exact root of two and drops no bits that
hold, i-exp has the paper's coefficients and no quantizer of its own in the middle of a softmax, sums of squares have 64
bits in place of a learnt shift, and beta is not divided by gamma. Biases, weights and the scales of all quantizers are
the numbers of the simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ibert, ops
from hawq_tvm.core.errors import UsageError
from hawq_tvm.frontend.common.inputs import Declared, fixed_inputs
from hawq_tvm.frontend.common.values import Array, Tensor, Value
from hawq_tvm.frontend.common.writer import Env, Writer

from .model import POSITIONS, TYPES, WORDS, Model

IDS, MASK, OUTPUT = "input_ids", "attention_mask", "last_hidden_state"
TOKENS, EMBEDDED_BITS, ACT_BITS, NORM_BITS = 128, 16, 8, 22


@dataclass(frozen=True)
class Real:
    """A dequantized tensor, and the float32 scale of its integers."""

    expr: relax.Expr
    scale: np.float32


def longest(model: Model) -> int:
    """How many tokens have a position: numbers begin behind that of padding."""
    return model.positions - model.padding - 1


class Importer(Writer):
    """Imports one encoder.

    Raises UsageError for sentences with more tokens than the model has positions.
    """

    def __init__(self, model: Model, shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.model = model
        declared = [Declared(name, "int64", ["N", "L"]) for name in (IDS, MASK)]
        given = dict(shapes or {}) or {IDS: (1, min(TOKENS, longest(model)))}
        inputs, failures = fixed_inputs(declared, given)
        if failures:
            raise failures[0]
        super().__init__(inputs)
        self.count, self.tokens = inputs[0].shape
        if self.tokens > longest(model):
            raise UsageError(
                "is a longer sentence than the model has positions for",
                where=f"--shape {IDS}",
                expected=f"at most {longest(model)} tokens",
                found=str(self.tokens),
            )

    def quantizes(self) -> bool:
        """Whether the model is quantized: every I-BERT is."""
        return True

    def run(self) -> tvm.IRModule:
        """The module."""

        def body(env: Env) -> list[Value]:
            ids, mask = (env[name] for name in (IDS, MASK))
            assert isinstance(ids, Tensor) and isinstance(mask, Tensor)
            shown = self.bind(relax.op.not_equal(mask.expr, ops.const(0, "int64")), "mask")
            shown = self.bind(relax.op.reshape(shown, (self.count, 1, 1, self.tokens)), "mask.shown")
            hidden = self._embedded(ids.expr)
            for i in range(self.model.layers):
                hidden = self._layer(f"encoder.layer.{i}", hidden, shown)
            return [Tensor(hidden.expr, "float32")]

        names = ["embeddings", *(f"encoder.layer.{i}" for i in range(self.model.layers))]
        module = self.write(body, [OUTPUT], names)
        return tvm.IRModule({"main": module["main"].with_attr("hawq.nonlinear", ibert.NAME)})

    # -- quantizers --------------------------------------------------------------------------------------------

    def _act(self, name: str, real: relax.Expr, bits: int = ACT_BITS) -> Real:
        """A QuantAct; both branches of a sum are rounded on their own (A14)."""
        scale, half = self.model.scale(name, bits), 1 << bits - 1
        qtype = arith.QType(-half, half - 1, arith.smallest_storage(-half, half - 1))
        data = self.bind(ops.quantize(real, scale, 0, qtype=qtype, branches="each"), name)
        return self._real(data, scale, qtype.qmin, qtype.qmax, f"{name}.real")

    def _real(self, data: relax.Expr, scale: np.float32, low: int, high: int, name: str) -> Real:
        return Real(self.bind(ops.dequantize(data, scale, 0, qmin=low, qmax=high), name), scale)

    def _constant(self, values: Array, scale: Any, name: str) -> relax.Expr:
        low, high = int(values.min()), int(values.max())
        data = ops.const(values, arith.smallest_storage(min(low, -1), high))
        return self.bind(ops.dequantize(data, scale, np.zeros(np.shape(scale)), qmin=low, qmax=high), name)

    # -- the embedding -----------------------------------------------------------------------------------------

    def _embedded(self, ids: relax.Expr) -> Real:
        """Words, then the type and the positions added as a QuantAct of 16 bits rounds them: each on its own."""
        name = "embeddings.embeddings_act1"
        scale, half = self.model.scale(name, EMBEDDED_BITS), 1 << EMBEDDED_BITS - 1
        words, word_scale = self.model.table(WORDS)
        table = self._constant(words, word_scale, f"{WORDS}.weight")
        rows = self.bind(relax.op.take(table, ids, 0), WORDS)
        wide = arith.QType(-half * half, half * half, "int32")
        sums = self.bind(ops.quantize(rows, scale, 0, qtype=wide), f"{name}.words")
        first = self.model.padding + 1
        for other, chosen in ((TYPES, slice(0, 1)), (POSITIONS, slice(first, first + self.tokens))):
            values, own = self.model.table(other)
            ratio = Fraction(float(own)) / Fraction(float(scale))
            added = np.frompyfunc(lambda v, r=ratio: round(v * r), 1, 1)(values[chosen].astype(object))
            sums = self.bind(relax.op.add(sums, ops.const(added.astype(np.int64)[None], "int32")), other)
            sums = self.bind(relax.op.clip(sums, -half, half - 1), f"{other}.clipped")
        real = self._real(sums, scale, -half, half - 1, f"{name}.real")
        return self._normalized("embeddings.LayerNorm", real.expr, "embeddings.output_activation")

    def _normalized(self, name: str, real: relax.Expr, act: str) -> Real:
        gamma, beta = (self.model.array(f"{name}.{p}", (self.model.hidden,)) for p in ("weight", "bias"))
        parameters = [ops.const(p, "float32") for p in (gamma, beta)]
        y = relax.op.nn.layer_norm(
            real, *parameters, axes=-1, epsilon=float(self.model.config.get("layer_norm_eps", 0))
        )
        return self._act(act, self.bind(y, name))

    # -- a layer of the encoder --------------------------------------------------------------------------------

    def _linear(self, name: str, x: Real, outputs: int | None = None) -> relax.Expr:
        """A QuantLinear: sums of integers, whose bias is an integer of the same scale."""
        layer = self.model.linear(name, outputs, ops.shape_of(x.expr)[-1])
        weight = self._constant(layer.weight.T, layer.scale.reshape(1, -1), f"{name}.weight")
        # Two float32 numbers have an exact product in float64: the bias lies on the sums' own grid.
        grid = layer.scale.astype(np.float64) * np.float64(x.scale)
        bias = self._constant(layer.integer_bias(x.scale), grid, f"{name}.bias")
        sums = self.bind(relax.op.matmul(x.expr, weight), f"{name}.sums")
        return self.bind(relax.op.add(sums, bias), name)

    def _layer(self, layer: str, hidden: Real, shown: relax.Expr) -> Real:
        context = self._attention(f"{layer}.attention.self", hidden, shown)
        attended = self._output(f"{layer}.attention.output", context, hidden)
        attended = self._act(f"{layer}.pre_intermediate_act", attended.expr)
        inner = self._linear(f"{layer}.intermediate.dense", attended)
        inner = self.bind(relax.op.nn.gelu(inner), f"{layer}.intermediate.intermediate_act_fn")
        act = self._act(f"{layer}.intermediate.output_activation", inner)
        act = self._act(f"{layer}.pre_output_act", act.expr)
        return self._output(f"{layer}.output", act, attended)

    def _output(self, name: str, x: Real, residual: Real) -> Real:
        """A fully connected layer, the residual, and LayerNorm of their sum in 22 bits."""
        sums = self._linear(f"{name}.dense", x, self.model.hidden)
        total = self.bind(relax.op.add(sums, residual.expr), f"{name}.sum")
        total = self._act(f"{name}.ln_input_act", total, NORM_BITS).expr
        return self._normalized(f"{name}.LayerNorm", total, f"{name}.output_activation")

    def _attention(self, name: str, hidden: Real, shown: relax.Expr) -> Real:
        heads, hidden_size = self.model.heads, self.model.hidden
        depth = hidden_size // heads

        def projected(part: str, finer: float = 1.0) -> tuple[relax.Expr, np.float32]:
            act = f"{name}.{part}_activation"
            made = self._act(act, self._linear(f"{name}.{part}", hidden, hidden_size))
            expr = made.expr
            if finer != 1.0:
                data = self.builder.lookup_binding(expr).args[0]
                scale = np.float64(made.scale) / finer
                expr = self.bind(ops.dequantize(data, scale, 0, qmin=-128, qmax=127), f"{act}.finer")
            apart = self.bind(relax.op.reshape(expr, (self.count, self.tokens, heads, depth)), f"{act}.heads")
            return self.bind(relax.op.permute_dims(apart, [0, 2, 1, 3]), f"{act}.moved"), made.scale

        (query, _), (key, _), (value, _) = projected("query"), projected("key", math.sqrt(depth)), projected("value")
        columns = self.bind(relax.op.permute_dims(key, [0, 1, 3, 2]), f"{name}.columns")
        scores = self.bind(relax.op.matmul(query, columns), f"{name}.scores")
        scores = self.bind(relax.op.where(shown, scores, relax.const(-math.inf)), f"{name}.masked")
        p = self.bind(relax.op.nn.softmax(scores, -1), f"{name}.softmax")
        p = self.bind(ops.quantize(p, 2.0**-8, 0, qtype=arith.QType.of("uint8"), rounding="floor"), f"{name}.softmax.8")
        p = self._real(p, np.float32(2.0**-8), 0, 255, f"{name}.probabilities").expr
        context = self.bind(relax.op.matmul(p, value), f"{name}.context")
        context = self.bind(relax.op.permute_dims(context, [0, 2, 1, 3]), f"{name}.context.moved")
        context = relax.op.reshape(context, (self.count, self.tokens, hidden_size))
        return self._act(f"{name}.output_activation", self.bind(context, f"{name}.context.joined"))

"""A checked checkpoint written as an ANNOTATED module, in HAWQ's own arithmetic.

HAWQ multiplies integers by x / s_x, and rescales by dyadic numbers that it computes itself: m / 2^e is the 31-bit number nearest to the float64
quotient of float32(s_x s_w) and s_y. So integers enter a convolution with the scale 1, and its weights carry the scale s_y m / 2^e, which makes the
ratio of the next requantize exactly m / 2^e; what is real stays real up to 2^-31. Everything rounds half to even; every branch of a sum on its own (A14).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm import arith, ops
from hawq_tvm.errors import ModelError

from ..common.inputs import Declared, fixed_inputs
from ..common.text import first_line
from ..common.values import Array, Tensor, Value
from ..common.writer import TYPE_RULE_ERRORS, Env, Writer
from .model import Layer, Model
from .networks import Act, MaxPool, MeanPool, Step, Weighted

INPUT, OUTPUT = "input", "output"
UNSIGNED_BITS = 4


@dataclass(frozen=True)
class Integers:
    """A quantized tensor, its scale, and whether it can be negative."""

    data: relax.Expr
    scale: np.float32
    signed: bool = True


def act_type(bits: int) -> arith.QType:
    """What an activation of so many bits can hold: HAWQ takes 4 bits as unsigned without a zero point, which clamps what is negative, others as signed."""
    if bits == UNSIGNED_BITS:
        return arith.QType.of("uint4")
    return arith.QType(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, "int8" if bits <= 8 else "int16")


def dyadic(product: Array, scale: np.float32) -> Array:
    """HAWQ's m / 2^e for a change of scale from `product` (float32) to `scale`, times `scale`, in float64."""
    quotients = product.astype(np.float64) / np.float64(scale)
    numbers = []
    for q in quotients.ravel().tolist():
        m, s = arith.dyadic(Fraction(q), max_shift=2**20)
        numbers.append(float(Fraction(m, 2**s) * Fraction(float(scale))))
    return np.array(numbers).reshape(quotients.shape)


class Importer(Writer):
    """Imports one model.

    Raises UsageError for a shape that does not fit the network's input.
    """

    def __init__(self, model: Model, shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.model, net = model, model.net
        declared = Declared(INPUT, "float32", ["N", 3, "H", "W"])
        inputs, failures = fixed_inputs([declared], shapes or {INPUT: (1, 3, net.pixels, net.pixels)})
        if failures:
            raise failures[0]
        super().__init__(inputs)
        self.weighted = {w.layer: w for w in net.weighted}
        self.values: dict[str, Integers] = {}

    def quantizes(self) -> bool:
        """Whether the model is quantized: every checkpoint is."""
        return True

    def run(self) -> tvm.IRModule:
        """The module."""
        steps = self.model.net.steps

        def body(env: Env) -> list[Value]:
            image = env[INPUT]
            assert isinstance(image, Tensor)
            for step in steps:
                self._guarded(step, partial(self._import, step, image.expr))
            return [Tensor(self._guarded(steps[-1], partial(self._classes, steps[-1])), "float32")]

        return self.write(body, [OUTPUT], [s.layer for s in steps])

    def _guarded(self, step: Step, import_: Callable[[], Any]) -> Any:
        try:
            return import_()
        except TYPE_RULE_ERRORS as e:
            shape = "x".join(str(d) for d in self.inputs[0].shape)
            raise ModelError(
                f"does not fit its operands: {first_line(e)}", where=step.layer, found=f"an input of {shape}",
                remedy=f"give a larger image: --shape {INPUT}=1x3x{self.model.net.pixels}x{self.model.net.pixels}",
            ) from None  # fmt: skip

    def _import(self, step: Step, image: relax.Expr) -> None:
        if isinstance(step, Act):
            self.values[step.layer] = self._act(step, image)
        elif isinstance(step, MaxPool):
            self.values[step.layer] = self._max_pool(step)
        elif isinstance(step, MeanPool):
            self.values[step.layer] = self._mean_pool(step)

    # -- quantizers ----------------------------------------------------------------------------------------

    def _act(self, step: Act, image: relax.Expr) -> Integers:
        scale, qtype = self.model.scales[step.layer], act_type(self.model.bits[step.layer])
        if not step.sources:
            quantized = ops.quantize(image, scale, 0, qtype=qtype, form="reciprocal")
            return Integers(self.bind(quantized, step.layer), scale)
        parts = [self._real(source, scale, step.layer) for source in step.sources]
        if step.joined:
            real = self.bind(relax.op.concat(parts, 1), f"{step.layer}.concat")
        else:
            real = parts[0] if len(parts) == 1 else self.bind(relax.op.add(*parts), f"{step.layer}.sum")
        if len(parts) == 2 and not step.joined:
            # HAWQ clamps no sum of branches: behind ReLU 16 bits without a sign hold twice its calibrated range, what has a sign gets 32.
            qtype = arith.QType.of("int32" if step.high is None else "uint16")
        signed = step.high is None and not all(s in self.values and not self.values[s].signed for s in step.sources)
        if step.high is not None:
            real = self.bind(relax.op.nn.relu(real), f"{step.layer}.relu")
        if step.high is not None and np.isfinite(step.high):
            return Integers(self._clipped(step, real, scale, qtype), scale, signed)
        return Integers(self.bind(ops.quantize(real, scale, 0, qtype=qtype, branches="each"), step.layer), scale, signed)

    def _clipped(self, step: Act, real: relax.Expr, scale: np.float32, qtype: arith.QType) -> relax.Expr:
        """`real` quantized, with what ReLU6 leaves: one bound, or where HAWQ's float32 makes channels differ, one for each."""
        ceiling = np.minimum(self._ceiling(step, scale), qtype.qmax)
        bounded = arith.QType(qtype.qmin, int(ceiling.max()), qtype.storage)
        quantized = ops.quantize(real, scale, 0, qtype=bounded)
        if np.all(ceiling == ceiling[0]):
            return self.bind(quantized, step.layer)
        rounded = self.bind(quantized, f"{step.layer}.rounded")
        return self.bind(relax.op.minimum(rounded, ops.const(ceiling.reshape(1, -1, 1, 1), qtype.storage)), step.layer)

    def _ceiling(self, step: Act, scale: np.float32) -> Array:
        """What ReLU6 leaves of a channel, in steps of `scale`: HAWQ clips the real value, brings 6 back to the sum's grid in float32, and rescales that."""
        (source,) = step.sources
        weighted = self.weighted[source]
        x_scale, layer = self.values[weighted.x].scale, self.model.layers[source]
        scales = np.broadcast_to(layer.scale, layer.weight.shape[:1])
        level = np.rint(np.float32(step.high) / x_scale / scales).astype(np.float64)
        ratios = [Fraction(v) / Fraction(float(scale)) for v in dyadic(scales * x_scale, scale).tolist()]
        return np.array([round(Fraction(n) * r) for n, r in zip(level.tolist(), ratios, strict=True)], np.int64)

    def _real(self, source: str, scale: np.float32, reader: str) -> relax.Expr:
        """What a quantizer to `scale` reads, as a real tensor whose integers become its own by HAWQ's dyadic number."""
        if source in self.weighted:
            step, layer = self.weighted[source], self.model.layers[source]
            product = layer.scale * self.values[step.x].scale
            return self._weighted(step, layer, dyadic(product, scale))
        value = self.values[source]
        return self._dequantized(value.data, dyadic(np.asarray(value.scale), scale), f"{reader}.{source}")

    def _dequantized(self, data: relax.Expr, scale: Any, name: str) -> relax.Expr:
        low, high = arith.RANGES[ops.dtype_of(data)]
        return self.bind(ops.dequantize(data, scale, 0, qmin=low, qmax=high), name)

    # -- layers --------------------------------------------------------------------------------------------

    def _weighted(self, step: Weighted, layer: Layer, scale: Array) -> relax.Expr:
        """A layer's sums times `scale`, of one value or one per output."""
        x = self._dequantized(self.values[step.x].data, np.float32(1), f"{step.layer}.x")
        spread = (1, -1) if len(step.shape) == 2 else (1, -1, 1, 1)
        if len(step.shape) == 2:
            flat = self.bind(relax.op.reshape(x, (ops.shape_of(x)[0], -1)), f"{step.layer}.flat")
            y = relax.op.matmul(flat, self._constant(layer.weight.T, scale.reshape(1, -1), f"{step.layer}.weight"))
        else:
            weight = self._constant(layer.weight, scale.reshape(-1, 1, 1, 1), f"{step.layer}.weight")
            y = relax.op.nn.conv2d(x, weight, strides=step.stride, padding=step.padding, groups=step.groups)
        y = self.bind(y, f"{step.layer}.acc" if layer.bias is not None else step.layer)
        if layer.bias is None:
            return y
        bias = self._constant(layer.bias.reshape(spread), scale.reshape(spread), f"{step.layer}.bias")
        return self.bind(relax.op.add(y, bias), step.layer)

    def _constant(self, values: Array, scale: Array, name: str) -> relax.Expr:
        low, high = int(values.min()), int(values.max())
        data = ops.const(values, arith.smallest_storage(min(low, -1), high))
        return self.bind(ops.dequantize(data, scale, np.zeros(scale.shape), qmin=low, qmax=high), name)

    def _classes(self, step: Step) -> relax.Expr:
        """The last layer: its sums times float32(s_x s_w), one row per image."""
        assert isinstance(step, Weighted)
        layer = self.model.layers[step.layer]
        y = self._weighted(step, layer, layer.scale * self.values[step.x].scale)
        return y if len(step.shape) == 2 else self.bind(relax.op.reshape(y, (ops.shape_of(y)[0], -1)), OUTPUT)

    # -- pools ---------------------------------------------------------------------------------------------

    def _max_pool(self, step: MaxPool) -> Integers:
        value = self.values[step.x]
        data, pad = value.data, step.padding
        if pad:
            lowest = arith.RANGES[ops.dtype_of(data)][0]
            data = self.bind(relax.op.nn.pad(data, [0, 0, 0, 0, pad, pad, pad, pad], "constant", lowest), f"{step.layer}.pad")
        return Integers(self.bind(relax.op.nn.max_pool2d(data, (3, 3), (2, 2)), step.layer), value.scale, value.signed)

    def _mean_pool(self, step: MeanPool) -> Integers:
        """HAWQ cuts the mean of the integers off after it added 0.01: the fraction of a mean of up to 99 of them stays below 1."""
        value = self.values[step.x]
        real = self._dequantized(value.data, value.scale, f"{step.layer}.x")
        if step.whole:
            mean = relax.op.nn.avg_pool2d(real, ops.shape_of(real)[2:])
        else:
            mean = relax.op.nn.avg_pool2d(real, (3, 3), (1, 1), (1, 1), count_include_pad=True)
        mean = self.bind(mean, f"{step.layer}.mean")
        raised = self.bind(relax.op.add(mean, ops.const(np.float32(0.01) * value.scale, "float32")), f"{step.layer}.raised")
        whole = arith.QType.of(ops.dtype_of(value.data))
        qtype = whole if value.signed else arith.QType(0, whole.qmax, whole.storage)
        return Integers(self.bind(ops.quantize(raised, value.scale, 0, qtype=qtype, rounding="toward_zero"), step.layer), value.scale, value.signed)

"""GELU, erf and LayerNorm in the arithmetic of I-BERT (A28), (A30), where a model asks for it; `rescale` has its
softmax.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ibert, ibert_ops, ops, stages

from .fixed import fixed, single
from .functions import Region
from .realize import FIXED_BITS
from .values import INSERT, TENSORS, Array, Context, Real, Term, Value, is_uniform, with_bias

# Of a normalization's input that no quantize precedes; its reciprocal loses as many bits as its sum of squares has.
NORM_BITS = 16
SAMPLES: Array = np.concatenate([np.linspace(-12, 12, 481), [-40.0, 40.0]])
erf = np.vectorize(math.erf, otypes=[np.float64])
_ERF: Array = erf(SAMPLES / math.sqrt(2))
_TANH: Array = np.tanh(math.sqrt(2 / math.pi) * (SAMPLES + 0.044715 * SAMPLES**3))
_BENT = ("relax.erf", "relax.tanh", "relax.nn.gelu", "relax.nn.gelu_tanh")


class Owned:
    """Tells GELU and erf among the functions of `main`, by their values: however they are written, and within what the
    float constants that they are written with allow.
    """

    def __init__(self, main: relax.Function) -> None:
        self.readers: dict[relax.Var, list[str]] = defaultdict(list)
        for b in stages.bindings(main):
            for v in ops.variables(b.value):
                self.readers[v].append(ops.op_name(b.value))

    def __call__(self, region: Region) -> bool:
        """Whether a function is GELU or its form with a tanh, or an erf with which nothing is computed any more but its
        quantize.
        """
        if ops.op_name(region.graph.values[region.root]) == "relax.erf":
            return all(name == "hawq.quantize" for name in self.readers[region.root])
        if sum(ops.op_name(region.graph.values[v]) in _BENT for v in region.order) != 1:
            return False
        with np.errstate(all="ignore"):
            values = np.broadcast_to(region.evaluate(SAMPLES), SAMPLES.shape)
        near = 1e-5 * (1 + np.abs(SAMPLES))
        return any(bool(np.all(np.abs(values - SAMPLES * (1 + gate) / 2) <= near)) for gate in (_ERF, _TANH))


def polynomial(ctx: Context, region: Region, value_of: Callable[[relax.Var], Value]) -> Value:
    """i-GELU or i-erf (A28) of the integers that stand for a tensor, or of a fixed-point value (A26).

    region: the function.  A tensor of up to 16 bits is compared with it at every integer that it can hold.
    """
    call = region.graph.values[region.root]
    is_erf = ops.op_name(call) == "relax.erf"
    value, function = value_of(call.args[0] if is_erf else region.leaf), erf if is_erf else region.evaluate
    if not isinstance(value, TENSORS):
        return None
    op = "erf" if is_erf else "gelu"
    term = _without_zero(ctx, _positive(ctx, value, single(ctx, value, op), op, FIXED_BITS))
    shape = np.shape(term.scale)
    ends = [_of_each_scale(b, shape, f) for b, f in zip(ctx.bounds(term.data), (np.min, np.max), strict=True)]
    most = [max(-int(a), int(b), 1) for a, b in zip(ends[0].flat, ends[1].flat, strict=True)]
    try:
        numbers = (ibert.Polynomial.erf if is_erf else ibert.Polynomial.gelu)(list(term.scale.flat), most)
    except OverflowError as e:
        raise ctx.fail(op, f"its input has {e}", "quantize its input with a larger scale") from None
    if len(most) == 1 and most[0] <= 1 << 16:
        q = np.arange(int(ends[0].flat[0]), int(ends[1].flat[0]) + 1)
        made = ibert.erf(q, numbers.corner[0], numbers.constant[0], numbers.shift)
        made = made if is_erf else q * (made + numbers.one[0])
        real = function(q * float(term.scale.flat[0])) / float(numbers.scale[0])
        numbers = replace(numbers, distance=(float(np.max(np.abs(made - real))) * (1 + 2.0**-30),))
    data = ctx.emit(ibert_ops.i_gelu(term.data, numbers, shape, (ends[0], ends[1])), f"i_{op}")
    scale = np.array(numbers.scale, object).reshape(shape)
    return Real(value.shape, (Term(data, np.zeros((), np.int64), scale),))


def _positive(ctx: Context, value: Value, term: Term, op: str, bits: int) -> Term:
    """The term, or a fixed-point value where its scale is not positive everywhere."""
    if all(s > 0 for s in term.scale.flat):
        return term
    if not ctx.feeding:
        raise ctx.fail(op, "its input has a scale that is not positive", INSERT)
    return fixed(ctx, value, op, bits)


def _without_zero(ctx: Context, term: Term) -> Term:
    """A term whose integers have no zero point any more."""
    term = with_bias(ctx, term)
    if not np.any(term.zero):
        return term
    wide = relax.op.astype(term.data, "int32")
    data = ctx.emit(relax.op.subtract(wide, ops.const(term.zero, "int32")), "centred")
    return replace(term, data=data, zero=np.zeros((), np.int64))


def _of_each_scale(bound: Array, shape: tuple[int, ...], least: Callable[..., Any]) -> Array:
    """Bounds of a tensor's elements as bounds for each of its scales, whose shape broadcasts against the tensor's."""
    if bound.size == 1 or not shape:
        return np.full(shape, int(least(bound)), object)
    rank = max(bound.ndim, len(shape))
    bound, inner = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (bound, np.empty(shape, bool)))
    along = tuple(i for i, n in enumerate(inner.shape) if n == 1)
    return np.broadcast_to(least(bound, axis=along, keepdims=True), inner.shape).reshape(shape).astype(object)


def normalized(ctx: Context, value: Value, axes: Sequence[int], count: int) -> Term:
    """(A30) over `axes`, of rows of `count`: the term of scale sqrt(n) 2^-30."""
    term = single(ctx, value, "layer_norm", bits=NORM_BITS)
    if not is_uniform(term.scale) or not is_uniform(term.zero):
        if not ctx.feeding:
            raise ctx.fail("layer_norm", "its input has one scale per channel", INSERT)
        term = fixed(ctx, value, "layer_norm", NORM_BITS)
    term = with_bias(ctx, _positive(ctx, value, term, "layer_norm", NORM_BITS))
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
    if count * (high - low) ** 2 >= 1 << arith.MAX_SHIFT:
        found = f"rows of {count} integers in {low}..{high}"
        raise ctx.fail("layer_norm", f"its squares leave 62 bits ({found})", "quantize its input to 16 bits")
    data = ctx.emit(ibert_ops.i_layer_norm(term.data, axes, int(term.zero.flat[0])), "normalized")
    return Term(data, np.zeros((), np.int64), np.asarray(ibert.normalized_scale(count), object))

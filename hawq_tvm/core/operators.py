"""One row per integer operator: what the stages, intervals, layout, fusion and schedules need to know of it.

Its arithmetic stands in other places, each once: the reference (`verify/reference.py`), the emitter
(`schedules/emit/`), torch for fine-tuning (`quantize/qat/integers.py`), and `ops.py` for the type of its result and
its constructor. Adding an operator means a row here, a function there, an emitter.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from . import division, ibert_ops, intervals, ops
from .intervals import Bounds, Interval


class Kind(enum.Enum):
    """How an operator's result hangs on its operands, which decides where it may stand in a layer."""

    BORDER = "joins the float and the integer world: a layer of its own"
    ELEMENTWISE = "every element from the same element of the operands: joins a layer, follows its layout"
    REDUCTION = "many elements make one: the anchor that decides a layer's loops"
    MOVEMENT = "elements change their place, their number or how they are stored"


@dataclass(frozen=True)
class Operator:
    """Facts about one operator.

    interval: of a call's result from those of its arguments (tuples for tuples).  elementwise: may end a layer
    element by element (a border operator too).  reduces: is an anchor for the schedules (a border operator too).
    sums: adds many terms in an order of its own, so partial sums count.  grows: its result can leave the type of its
    operands.  feeds: may be computed inside the layer that alone reads it.  in_lines: neighbours along the last axis
    stay neighbours.  chooses: its result holds nothing but elements of its operand, as a movement's does.
    tables: its operands but the first are read at places that the first decides: they have no layout.
    before_lowering: may stand in an ANNOTATED module.
    """

    name: str
    kind: Kind
    interval: Callable[..., Any]
    sums: bool = False
    grows: bool = False
    feeds: bool = False
    in_lines: bool = False
    chooses: bool = False
    tables: bool = False
    before_lowering: bool = True
    elementwise_border: bool = False
    reducing_border: bool = False


OPERATORS: dict[str, Operator] = {}


def add(operator: Operator, infer: Callable[[relax.Call, Any], Any] | None = None) -> None:
    """Add a row; infer: the type of a call's result, for an operator that TVM does not know yet."""
    if infer is not None:
        ops.register(operator.name, infer)
    OPERATORS[operator.name] = operator


def is_elementwise(name: str) -> bool:
    """Whether a layer's epilogue may hold the operator."""
    row = OPERATORS.get(name)
    return row is not None and (row.kind is Kind.ELEMENTWISE or row.elementwise_border)


def is_anchor(name: str) -> bool:
    """Whether the operator reduces, and so decides the loops of the layer it stands in."""
    row = OPERATORS.get(name)
    return row is not None and (row.kind is Kind.REDUCTION or row.reducing_border)


def is_border(name: str) -> bool:
    """Whether the operator joins the float and the integer world."""
    return kind_of(name) is Kind.BORDER


def reads_tables(name: str) -> bool:
    """Whether all operands but the first are tables, which are read by values and not by places."""
    return name in OPERATORS and OPERATORS[name].tables


def kind_of(name: str) -> Kind | None:
    """The operator's kind; None for a float operator, or none at all."""
    row = OPERATORS.get(name)
    return None if row is None else row.kind


def interval_of(call: relax.Call, args: Sequence[Any]) -> Bounds:
    """The interval of a call's result from those of its arguments (tuples for tuple arguments and tuple results).

    Raises KeyError for an operator outside the integer grammar.
    """
    found: Bounds = OPERATORS[ops.op_name(call)].interval(call, *args)
    return found


def partial_sums(call: relax.Call, args: Sequence[Any], result: Any) -> Any:
    """The interval of an accumulator while it is being summed, in whatever order and from 0 on.

    The partial sums of a sum of products lie between the sums of its negative and of its positive contributions: the
    result's interval, which is known, were the first argument able to be 0 as well.
    """
    if OPERATORS[ops.op_name(call)].sums and not args[0].holds_zero:
        return interval_of(call, [args[0].with_zero(), *args[1:]])
    return result


def _bit(*_: Any) -> Interval:
    return Interval.of_range(0, 1)


def _byte(*_: Any) -> Interval:
    return Interval.of_range(0, 255)


def _nothing(*_: Any) -> Interval:
    return Interval.of_range(0, 0)


def _same(call: relax.Call, x: Interval) -> Interval:
    return x


def _split(call: relax.Call, x: Interval) -> tuple[Interval, ...]:
    return tuple(x.collapse() for _ in call.ty.fields)


_B, _E, _R, _M = Kind.BORDER, Kind.ELEMENTWISE, Kind.REDUCTION, Kind.MOVEMENT
_ROWS = (
    Operator("hawq.quantize", _B, intervals.declared, elementwise_border=True),
    Operator("hawq.dequantize", _B, _nothing, elementwise_border=True),
    Operator("hawq.dynamic_quantize", _B, intervals.dynamic, reducing_border=True),
    Operator("hawq.requantize", _E, intervals.requantize, before_lowering=False),
    Operator("hawq.lookup", _E, intervals.lookup, tables=True),
    Operator("hawq.interpolate", _E, intervals.interpolate, tables=True, before_lowering=False),
    Operator("hawq.divide", _E, division.interval, before_lowering=False),
    Operator("relax.astype", _E, _same, feeds=True),
    Operator("relax.add", _E, intervals.binary("add"), grows=True),
    Operator("relax.subtract", _E, intervals.binary("subtract"), grows=True, feeds=True),
    Operator("relax.multiply", _E, intervals.binary("multiply"), grows=True),
    Operator("relax.maximum", _E, intervals.binary("maximum")),
    Operator("relax.minimum", _E, intervals.binary("minimum")),
    Operator("relax.clip", _E, intervals.clip),
    Operator("relax.where", _E, intervals.where),
    *(
        Operator(f"relax.{n}", _E, _bit)
        for n in ("greater", "greater_equal", "less", "less_equal", "equal", "not_equal")
    ),
    *(Operator(f"relax.logical_{n}", _E, _bit) for n in ("and", "or", "xor", "not")),
    Operator("relax.nn.conv2d", _R, intervals.conv2d, sums=True, grows=True),
    Operator("relax.matmul", _R, intervals.matmul, sums=True, grows=True),
    Operator("hawq.sum_pool2d", _R, intervals.sum_pool2d, sums=True, grows=True),
    Operator("relax.sum", _R, intervals.sum_, sums=True, grows=True),
    Operator("relax.nn.max_pool2d", _R, intervals.per_channel, chooses=True),
    Operator("relax.max", _R, intervals.moved, chooses=True),
    Operator("relax.min", _R, intervals.moved, chooses=True),
    Operator("relax.argmax", _R, intervals.argument),
    Operator("relax.argmin", _R, intervals.argument),
    Operator("hawq.softmax", _R, intervals.softmax, before_lowering=False),
    Operator("hawq.softmax_wide", _R, intervals.softmax, before_lowering=False),
    Operator("hawq.layer_norm", _R, intervals.layer_norm, before_lowering=False),
    *(Operator(n, _E, ibert_ops.polynomial_interval, before_lowering=False) for n in ibert_ops.POLYNOMIALS),
    Operator("hawq.i_softmax", _R, intervals.softmax, before_lowering=False),
    Operator("hawq.i_layer_norm", _R, ibert_ops.layer_norm_interval, before_lowering=False),
    Operator("relax.reshape", _M, intervals.moved, in_lines=True),
    Operator("relax.flatten", _M, intervals.moved, in_lines=True),
    Operator("relax.squeeze", _M, intervals.moved, in_lines=True),
    Operator("relax.expand_dims", _M, intervals.moved, in_lines=True),
    Operator("relax.strided_slice", _M, intervals.moved, in_lines=True),
    Operator("relax.split", _M, _split, in_lines=True),
    Operator("relax.concat", _M, intervals.concat, in_lines=True),
    Operator("relax.nn.pad", _M, intervals.pad, in_lines=True, feeds=True),
    Operator("hawq.dilate2d", _M, intervals.dilate, feeds=True),
    Operator("relax.permute_dims", _M, intervals.moved),
    Operator("relax.broadcast_to", _M, intervals.moved),
    Operator("relax.take", _M, intervals.moved),
    Operator("relax.flip", _M, intervals.moved),
    Operator("relax.tile", _M, intervals.moved),
    Operator("relax.repeat", _M, intervals.moved),
    Operator("hawq.unpack_int4", _M, intervals.unpack, feeds=True, before_lowering=False),
    Operator("hawq.pack_int4", _M, _byte, before_lowering=False),
)
for _row in _ROWS:
    add(_row)

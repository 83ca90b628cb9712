"""Where a scale spoils a quantized model that compiles all the same: what `inspect` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages

FEWEST = 8  # steps that a part of a joined tensor must have left
# Scales beyond these no calibration gives, and scales of one tensor so far apart have no common sum in float32.
SMALLEST, LARGEST, APART = 2.0**-60, 2.0**30, 2.0**24
_BOUNDED = {
    "relax.sigmoid": (0.0, 1.0),
    "relax.nn.softmax": (0.0, 1.0),
    "relax.tanh": (-1.0, 1.0),
    "relax.erf": (-1.0, 1.0),
}
_MOVED = (
    "relax.reshape",
    "relax.permute_dims",
    "relax.expand_dims",
    "relax.squeeze",
    "relax.broadcast_to",
    "relax.nn.max_pool2d",
)
_SUMS = ("relax.add", "relax.subtract", "relax.where", "relax.maximum", "relax.minimum")


@dataclass(frozen=True)
class _Part:
    """What is known of the values of a tensor, or of one that it was joined of: where they were made, and how far apart
    the largest and the smallest can be.  levels: that its own type tells apart, None for floats.
    """

    name: str
    span: float
    levels: int | None = None


@dataclass(frozen=True)
class _Joined:
    """The parts of a tensor that are known; summed: it is their sum, or chosen from them place by place."""

    parts: tuple[_Part, ...]
    summed: bool = False


def hints(annotated: tvm.IRModule) -> list[str]:
    """A sentence for every quantize (ANNOTATED stage) whose scale leaves nothing of a tensor that it reads.

    That is a part of a concatenation with fewer than FEWEST steps left, such as a detector's scores beside its boxes,
    and an operand of a sum with less than one, such as attention scores beside a mask of the least float. And one for
    scales that no calibration gives, or that lie too far apart within what is summed.
    """
    main, found = annotated["main"], []
    known: dict[relax.Var, _Joined] = {}
    quantized: set[relax.Expr] = set()
    nodes = stages.model_nodes(main)
    for b in stages.bindings(main):
        name = stages.model_node(b.var.name, nodes)
        if ops.op_name(b.value) == "hawq.quantize":
            quantized.add(b.var)
            found += _judged(name, b.value, known.get(b.value.args[0])) or _extreme(name, b.value)
        elif ops.op_name(b.value) == "hawq.dequantize" and b.value.args[0] not in quantized:
            found += _extreme(name, b.value)
        joined = _joined(name, b.value, known)
        if joined is not None and joined.parts:
            known[b.var] = joined
    return found


def _extreme(name: str, value: relax.Expr) -> list[str]:
    """What is wrong with the scales of a quantize or dequantize by themselves; those of zeros are left alone."""
    data, scale = value.args[0], ops.const_value(value.args[1]).astype(np.float64)
    used = scale
    if ops.is_const(data):
        full = scale.reshape((1,) * (len(ops.shape_of(data)) - scale.ndim) + scale.shape)
        shared = tuple(i for i, size in enumerate(full.shape) if size == 1)
        used = full[np.any(ops.const_value(data) != ops.const_value(value.args[2]), axis=shared, keepdims=True)]
    if not used.size:
        return []
    low, high, said = float(used.min()), float(used.max()), []
    for found in (s for s in (low, high) if not SMALLEST <= s <= LARGEST):
        masks = ", with masks of about -100 where they are the least float" if found > LARGEST else ""
        said.append(f"{name}: a scale of {found:.3g} is none that a calibration gives; remedy: calibrate again{masks}")
    # Of a weight with one scale an output every sum has its own.
    summed = not ops.is_const(data) or sum(n > 1 for n in scale.shape) > 1
    if not said and summed and high / low > APART:
        said.append(
            f"{name}: its scales are up to {high / low:.2g} times apart, so the smaller leave nothing in a sum with the"
            " larger; remedy: calibrate again"
        )
    return said[:1]


def _joined(name: str, value: relax.Expr, known: dict[relax.Var, _Joined]) -> _Joined | None:
    """What is known of a value."""
    op = ops.op_name(value)
    if op == "hawq.dequantize" and not ops.is_const(value.args[0]):
        levels = int(value.attrs["qmax"]) - int(value.attrs["qmin"])
        return _Joined((_Part(name, levels * float(ops.const_value(value.args[1]).max()), levels),))
    if op in _BOUNDED:
        low, high = _BOUNDED[op]
        return _Joined((_Part(name, high - low),))
    if op in _MOVED:
        return known.get(value.args[0])
    if op == "relax.concat":
        return _Joined(_parts(value.args[0], known))
    if op in _SUMS:
        return _Joined(_parts(value.args, known), summed=True)
    return None


def _parts(operands: Sequence[relax.Expr], known: dict[relax.Var, _Joined]) -> tuple[_Part, ...]:
    """The operands that are known and no sums."""
    found = [known[o] for o in operands if isinstance(o, relax.Var) and o in known]
    return tuple(part for joined in found if not joined.summed for part in joined.parts)


def _judged(name: str, quantize: relax.Call, read: _Joined | None) -> list[str]:
    if read is None:
        return []
    step, said = float(ops.const_value(quantize.args[1]).max()), []
    for part in read.parts:
        left = part.span / step
        if read.summed and left < 1:
            said.append(
                f"{name}: its step of {step:.3g} is more than the whole range of {part.name}, {part.span:.3g}, so"
                " nothing of that is left; remedy: if a mask made it, make that about -100 before quantizing, or"
                " quantize by `hawq-tvm quantize`, which keeps masks out of the scale"
            )
        elif not read.summed and left < min(FEWEST, (part.levels or 2 * FEWEST) / 2):
            said.append(
                f"{name}: one scale for tensors of unlike ranges leaves {part.name} only {left:.2g} steps; remedy:"
                " quantize its parts apart, or end the model before they are joined"
            )
    return said

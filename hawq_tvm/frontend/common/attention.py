"""Scaled dot-product attention, written as the products and the softmax that it is."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .node import Operation, expression, scalar
from .values import FLOAT_KINDS, Constant, Tensor, Value


def attended(
    node: Operation,
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    mask: Value | None,
    *,
    scale: float | None,
    causal: bool,
    grouped: bool,
) -> relax.Expr:
    """softmax(scale q k^T + mask) v.

    q: [..., heads, queries, depth]; k and v: [..., heads, keys, depth or another].  mask: numbers that are added, or
    truth values that keep a score.  scale: None for 1 / sqrt(depth).  causal: whether query i sees the keys up to i.
    grouped: whether k and v may have fewer heads, each of them for as many consecutive heads of q.
    Raises ModelError where the shapes do not fit.
    """
    shapes = [ops.shape_of(x) for x in (q, k, v)]
    (*_, depth), (*_, keys, own), (*_, values, _) = shapes
    heads, others = (s[-3] if len(s) > 2 else 1 for s in shapes[:2])
    fits = own == depth and values == keys and shapes[1][:-2] == shapes[2][:-2] and len({len(s) for s in shapes}) == 1
    fits = fits and shapes[0][:-3] == shapes[1][:-3] and (heads == others or (grouped and heads % others == 0))
    found = ", ".join(str(list(s)) for s in shapes)
    node.need(
        fits, "has a query, key and value that do not fit", expected="one depth, as many keys as values", found=found
    )
    if heads != others:
        axis = len(shapes[0]) - 3
        k, v = (node.emit(relax.op.repeat(x, heads // others, axis), name) for x, name in ((k, "keys"), (v, "values")))
    order = [*range(len(shapes[0]) - 2), len(shapes[0]) - 1, len(shapes[0]) - 2]
    scores = node.emit(relax.op.matmul(q, node.emit(relax.op.permute_dims(k, order), "columns")), "products")
    factor = 1 / math.sqrt(depth) if scale is None else scale
    scores = node.emit(relax.op.multiply(scores, scalar(factor, scores)), "scores")
    shown = _shown(node, mask, (*shapes[0][:-1], keys), causal)
    if mask is not None and mask.kind != "bool":
        scores = node.emit(relax.op.add(scores, expression(mask)), "biased")
    if shown is not None:
        scores = node.emit(relax.op.where(expression(shown), scores, scalar(-math.inf, scores)), "masked")
    p = node.emit(relax.op.nn.softmax(scores, -1), "probabilities")
    if shown is not None and not (isinstance(shown, Constant) and shown.array.any(-1).all()):
        p = node.emit(relax.op.where(expression(shown), p, scalar(0.0, p)), "shown")  # nothing of a row without any
    return relax.op.matmul(p, v)


def _shown(node: Operation, mask: Value | None, full: tuple[int, ...], causal: bool) -> Value | None:
    """The truth values that keep a score, None for all of them."""
    seen = Constant(np.tril(np.ones(full[-2:], np.bool_))) if causal else None
    if mask is None:
        return seen
    shape = (1,) * (len(full) - len(mask.shape)) + mask.shape
    node.need(
        len(shape) == len(full) and all(m in (1, n) for m, n in zip(shape, full, strict=True)),
        "has a mask that does not fit",
        expected=f"a shape that broadcasts to {list(full)}",
        found=list(mask.shape),
    )
    node.need(
        mask.kind == "bool" or mask.kind in FLOAT_KINDS,
        "has a mask of integers",
        expected="truth values or numbers that are added",
        found=mask.kind,
        remedy="put a Cast to bool in front of it",
    )
    if isinstance(mask, Constant):
        kept = mask.array if mask.kind == "bool" else ~np.isneginf(mask.array.astype(np.float32))
        if kept.all():
            return seen
        return Constant(kept if seen is None else kept & seen.array)
    if mask.kind != "bool" or seen is None:
        return mask if mask.kind == "bool" else seen
    return Tensor(node.emit(relax.op.logical_and(mask.expr, expression(seen)), "seen"), "bool")

"""Products of matrices."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.core import ops

from .node import Operation, expression, scalar
from .values import Array, Constant, Value


def check_product(node: Operation, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Raise ModelError unless two shapes can be multiplied as NumPy's matmul does."""
    depth = b[-2] if len(b) > 1 else b[0] if b else 0
    if not a or not b or a[-1] != depth:
        raise node.fail(
            "has operands that cannot be multiplied",
            expected="the last axis of the first to be the summed axis of the second",
            found=f"{list(a)} and {list(b)}",
        )


def gemm_of(node: Operation, a: relax.Expr, b: relax.Expr, c: Value | None, alpha: float, beta: float) -> relax.Expr:
    """alpha a b + beta c for matrices; c broadcasts to the product."""
    check_product(node, ops.shape_of(a), ops.shape_of(b))
    y = relax.op.matmul(a, b)
    if alpha != 1.0:
        y = relax.op.multiply(node.emit(y, "acc"), scalar(alpha, a))
    if c is None or beta == 0.0:
        return y
    shape = (ops.shape_of(a)[0], ops.shape_of(b)[1])
    full = (1,) * (2 - len(c.shape)) + tuple(c.shape)
    if len(c.shape) > 2 or any(n not in (1, s) for n, s in zip(full, shape, strict=True)):
        raise node.fail(
            "has a bias that does not fit",
            expected=f"a shape that broadcasts to {list(shape)}",
            found=str(list(c.shape)),
        )
    return relax.op.add(node.emit(y, "acc" if alpha == 1.0 else "scaled"), _scaled(node, c, beta))


def _scaled(node: Operation, c: Value, beta: float) -> relax.Expr:
    if beta == 1.0:
        return expression(c)
    if isinstance(c, Constant):
        stored: Array = c.stored()
        return expression(Constant((stored * stored.dtype.type(beta)).astype(stored.dtype)))
    return node.emit(relax.op.multiply(c.expr, scalar(beta, c.expr)), "bias")

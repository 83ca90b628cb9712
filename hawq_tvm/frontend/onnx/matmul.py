"""MatMul and Gemm."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.frontend.common.matmul import check_product, gemm_of

from .node import Node, expression, handles
from .values import Constant, Value


@handles("MatMul")
def matmul(node: Node) -> relax.Expr:
    """The product of two tensors of any rank, batches broadcast."""
    node.need(
        node.is_float(), "is supported on float tensors only", found=node.value(0).kind, remedy="use MatMulInteger"
    )
    check_product(node, node.shape(0), node.shape(1))
    return relax.op.matmul(node.expr(0), node.expr(1))


def transposed(node: Node, value: Value, flag: str, suffix: str) -> relax.Expr:
    """A matrix, transposed when the attribute says so."""
    if not node.flag(flag, 0):
        return expression(value)
    if isinstance(value, Constant):
        return expression(Constant(value.array.T))
    return node.emit(relax.op.permute_dims(value.expr, [1, 0]), suffix)


@handles("Gemm")
def gemm(node: Node) -> relax.Expr:
    """alpha A B + beta C, either factor transposed."""
    node.need(
        node.is_float(), "is supported on float tensors only", found=node.value(0).kind, remedy="use MatMulInteger"
    )
    for i in (0, 1):
        node.need(len(node.shape(i)) == 2, "multiplies matrices", expected="rank 2", found=list(node.shape(i)))
    a, b = transposed(node, node.value(0), "transA", "a"), transposed(node, node.value(1), "transB", "b")
    return gemm_of(node, a, b, node.optional(2), node.attr("alpha", 1.0), node.attr("beta", 1.0))

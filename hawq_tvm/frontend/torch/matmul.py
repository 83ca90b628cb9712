"""Linear layers and products of matrices."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.frontend.common.attention import attended
from hawq_tvm.frontend.common.matmul import check_product, gemm_of

from .node import Node, expression, handles


@handles("aten.linear")
def linear(node: Node) -> relax.Expr:
    """x W^T + bias; the weight has one row per output."""
    x, weight, bias = node.x(), node.expr(1), node.tensor("bias")
    rows = node.shape(1)
    node.need(len(rows) == 2, "has a weight that is no matrix", expected="rank 2", found=list(rows))
    check_product(node, node.shape(), rows[::-1])
    y = relax.op.matmul(x, node.emit(relax.op.permute_dims(weight, [1, 0]), "columns"))
    if bias is None:
        return y
    node.need(
        bias.shape in ((rows[0],), (1,)),
        "has a bias that does not fit",
        expected=f"shape [{rows[0]}]",
        found=list(bias.shape),
    )
    return relax.op.add(node.emit(y, "acc"), expression(bias))


@handles("aten.matmul", "aten.mm", "aten.bmm")
def matmul(node: Node) -> relax.Expr:
    """The product of two float tensors, batches broadcast."""
    a = node.x()
    node.need_float(node.value(1))
    check_product(node, node.shape(0), node.shape(1))
    return relax.op.matmul(a, node.expr(1))


@handles("aten.addmm")
def addmm(node: Node) -> relax.Expr:
    """beta bias + alpha A B for matrices."""
    for i in (1, 2):
        node.need_float(node.value(i))
        node.need(len(node.shape(i)) == 2, "multiplies matrices", expected="rank 2", found=list(node.shape(i)))
    return gemm_of(node, node.expr(1), node.expr(2), node.value(0), node.number("alpha", 1), node.number("beta", 1))


@handles("aten.scaled_dot_product_attention")
def attention(node: Node) -> relax.Expr:
    """softmax(scale Q K^T + mask) V."""
    node.need(node.number("dropout_p", 0) == 0, "drops probabilities", expected="dropout_p 0", remedy="call eval()")
    q, k, v = (node.operand(name) for name in ("query", "key", "value"))
    scale = float(node.number("scale")) if node.has("scale") else None
    causal, grouped = node.flag("is_causal"), node.flag("enable_gqa")
    return attended(node, q, k, v, node.tensor("attn_mask"), scale=scale, causal=causal, grouped=grouped)

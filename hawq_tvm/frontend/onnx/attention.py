"""Attention, of heads side by side (rank 3) or along an axis (rank 4)."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.frontend.common.attention import attended

from .node import Node, handles


@handles("Attention")
def attention(node: Node) -> relax.Expr:
    """softmax(scale Q K^T + mask) V for every head; fewer heads of K and V each stand for several of Q."""
    for index, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        node.need(
            not node.given(index),
            f"has a {name}, as of words that are made one after another",
            expected="Q, K, V and a mask",
            found=node.source(index),
            remedy="export the model without a cache, and mask what is padding",
        )
    node.need(not any(node.outputs[1:]), "gives more than its result", expected="one output", found=len(node.outputs))
    node.need(
        node.attr("softcap", 0.0) == 0.0,
        "caps its scores by a tanh, which has no integers",
        expected="softcap 0",
        found=node.attr("softcap", 0.0),
    )
    for name in ("left_window_size", "right_window_size"):
        node.need(
            node.attr(name, -1) == -1, f"has a {name}", expected="-1", found=node.attr(name, -1), remedy="use a mask"
        )
    ranks = [len(node.shape(i)) for i in range(3)]
    node.need(ranks in ([3] * 3, [4] * 3), "has operands of other ranks", expected="all 3, or all 4", found=ranks)
    flat = ranks[0] == 3
    q, k, v = (_heads(node, i, ("q" if i == 0 else "kv") + "_num_heads") if flat else node.expr(i) for i in range(3))
    causal, scale = node.flag("is_causal", 0), node.attr("scale", 0.0) if node.has("scale") else None
    y = attended(node, q, k, v, node.optional(3), scale=scale, causal=causal, grouped=True)
    if not flat:
        return y
    batch, length = node.shape()[:2]
    apart = node.emit(relax.op.permute_dims(node.emit(y, "heads"), [0, 2, 1, 3]), "rows")
    return relax.op.reshape(apart, (batch, length, -1))


def _heads(node: Node, index: int, name: str) -> relax.Expr:
    """[batch, length, heads depth] as [batch, heads, length, depth]."""
    shape, heads = node.shape(index), node.attr(name, 0)
    node.need(
        heads > 0 and shape[2] % heads == 0,
        f"has a {name} that does not fit",
        expected=f"a divisor of {shape[2]}",
        found=heads,
    )
    apart = node.emit(relax.op.reshape(node.expr(index), (*shape[:2], heads, shape[2] // heads)), f"apart{index}")
    return node.emit(relax.op.permute_dims(apart, [0, 2, 1, 3]), f"heads{index}")

"""com.microsoft.MatMulNBits: a product with a weight of packed blocks, which is a dequantize of blocks."""

from __future__ import annotations

import numpy as np
from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.frontend.common.matmul import check_product

from .node import MICROSOFT, Node, expression, handles
from .quant import read_scale
from .values import Array

WIDTHS = (2, 4, 8)


@handles("MatMulNBits", domain=MICROSOFT, inputs=(3, 6), checks_types=True)
def packed_matmul(node: Node) -> relax.Expr:
    """A W^T + bias: W of `N` rows and `K` columns, each `block_size` of which have a scale and a zero point."""
    depth, columns, bits = node.attr("K", 0), node.attr("N", 0), node.attr("bits", 4)
    block = node.attr("block_size", 0)
    node.need(bits in WIDTHS, "has a bit width that is not supported", expected="2, 4 or 8", found=bits)
    node.need(min(depth, columns, block) > 0, "lacks its sizes", expected="K, N and block_size above 0")
    node.need(not node.given(4), "orders its rows by an index", remedy="export it without g_idx")
    blocks = -(-depth // block)
    values = _opened(node, 1, "weight", (columns, blocks * block), bits)
    scale = read_scale(node, 2)
    node.need(scale.size == columns * blocks, "has scales that do not fit", expected=columns * blocks, found=scale.size)
    zero: Array = np.full((columns, blocks), 1 << (bits - 1))
    if node.given(3):
        zero = _opened(node, 3, "zero point", (columns, -(-blocks * bits // 8) * 8 // bits), bits)[:, :blocks]

    def spread(array: Array) -> Array:
        return np.repeat(array.reshape(columns, blocks), block, 1)[:, :depth].T

    stored = ops.const(values[:, :depth].T, "uint8")
    weight = ops.dequantize(stored, spread(scale), spread(zero), qmin=0, qmax=(1 << bits) - 1)
    check_product(node, node.shape(), (depth, columns))
    y = relax.op.matmul(node.expr(0), node.emit(weight, "weight"))
    if not node.given(5):
        return y
    bias = node.value(5)
    node.need(bias.shape == (columns,), "has a bias that does not fit", expected=[columns], found=list(bias.shape))
    return relax.op.add(node.emit(y, "acc"), expression(bias))


def _opened(node: Node, index: int, what: str, shape: tuple[int, int], bits: int) -> Array:
    """The integers of a packed constant, the first of each byte in its low bits."""
    packed = node.constant(index, what)
    expected = shape[0] * shape[1] * bits // 8
    if packed.dtype != np.uint8 or packed.size != expected:
        raise node.fail(
            f"has a {what} that does not fit",
            expected=f"{expected} bytes of uint8",
            found=f"{packed.dtype.name}{list(packed.shape)}",
        )
    shifts = np.arange(0, 8, bits)
    opened = (packed.reshape(-1, 1).astype(np.int64) >> shifts) & ((1 << bits) - 1)
    return np.asarray(opened.reshape(shape))

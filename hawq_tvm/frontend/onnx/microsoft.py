"""The com.microsoft QLinear operators of ONNX Runtime, expanded like the standard ones."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.frontend.common.activation import softmax_over
from hawq_tvm.frontend.common.elementwise import check_broadcast
from hawq_tvm.frontend.common.matmul import check_product, gemm_of
from hawq_tvm.frontend.common.quant import dequantized, quantized

from .matmul import transposed
from .movement import concat_axis
from .node import MICROSOFT, Handler, Node, expression, handles
from .pool import pool2d
from .qoperator import check_kind, exact_product, int32_bias, output_affine, qlinear_conv_nchw, real_input
from .quant import affine
from .values import Result, Tensor, Value


def _ms(name: str, low: int, high: int) -> Callable[[Handler], Handler]:
    return handles(name, domain=MICROSOFT, inputs=(low, high), checks_types=True)


def to_nchw(node: Node, value: Value) -> Value:
    """Input data of channels_last nodes, transposed so that channels come second."""
    if not node.flag("channels_last", 0):
        return value
    rank = len(value.shape)
    node.need(rank >= 3, "needs spatial axes", expected="rank 3 or more", found=rank)
    moved = node.emit(relax.op.permute_dims(expression(value), [0, rank - 1, *range(1, rank - 1)]), "nchw")
    return Tensor(moved, value.kind, value.bounds if isinstance(value, Tensor) else None)


def from_nchw(node: Node, result: Tensor) -> Tensor:
    """The result of a channels_last node with its channels at the end again."""
    if not node.flag("channels_last", 0):
        return result
    inner = node.emit(result.expr, "nchw_result")
    rank = len(ops.shape_of(inner))
    return Tensor(relax.op.permute_dims(inner, [0, *range(2, rank), 1]), result.kind, result.bounds)


@_ms("QLinearConv", 8, 9)
def qlinear_conv(node: Node) -> Result:
    """The standard QLinearConv, also with channels last."""
    return from_nchw(node, qlinear_conv_nchw(node, to_nchw(node, node.value(0))))


@_ms("QLinearAdd", 7, 8)
@_ms("QLinearMul", 7, 8)
def qlinear_binary(node: Node) -> Result:
    """Sum or product of two quantized tensors with numpy's broadcasting."""
    check_broadcast(node, node.value(0), node.value(3))
    a, b = real_input(node, 0, "a"), real_input(node, 3, "b")
    function = relax.op.add if node.op == "QLinearAdd" else relax.op.multiply
    return quantized(node.emit(function(a, b), "real"), output_affine(node, 6, 7, node.value(0).kind))


def _pooled(node: Node, pool: Callable[[relax.Expr], relax.Expr]) -> Tensor:
    kind = check_kind(node, 0)
    x = to_nchw(node, node.value(0))
    real = node.emit(dequantized(x, affine(node, 1, 2, kind, ())), "x")
    return from_nchw(node, quantized(node.emit(pool(real), "real"), output_affine(node, 3, 4, kind)))


@_ms("QLinearAveragePool", 4, 5)
def qlinear_average_pool(node: Node) -> Result:
    """The mean of each window."""
    return _pooled(node, lambda x: pool2d(node, x, "average"))


@_ms("QLinearGlobalAveragePool", 4, 5)
def qlinear_global_average_pool(node: Node) -> Result:
    """The mean over all spatial axes."""
    rank = len(node.shape())
    node.need(rank >= 3, "needs spatial axes", expected="rank 3 or more", found=rank)
    return _pooled(node, lambda x: relax.op.mean(x, list(range(2, rank)), keepdims=True))


@_ms("QLinearReduceMean", 4, 5)
def qlinear_reduce_mean(node: Node) -> Result:
    """The mean along axes."""
    rank = len(node.shape())
    axes = sorted(node.axes(node.attr("axes", []), rank)) or list(range(rank))
    mean = relax.op.mean(real_input(node, 0, "x"), axes, node.flag("keepdims", 1))
    return quantized(node.emit(mean, "real"), output_affine(node, 3, 4, node.value(0).kind))


@_ms("QLinearConcat", 5, 1 << 20)
def qlinear_concat(node: Node) -> Result:
    """Tensors of different scales joined at one: Y_scale, Y_zero_point, then a triple per tensor."""
    count = (len(node.inputs) - 2) // 3
    node.need(
        len(node.inputs) == 2 + 3 * count,
        "has inputs that are not triples",
        expected="2 + 3 n inputs",
        found=len(node.inputs),
    )
    node.need(node.has("axis"), "lacks its attribute axis")
    axis = concat_axis(node, [node.shape(2 + 3 * i) for i in range(count)])
    parts = [real_input(node, 2 + 3 * i, f"x{i}") for i in range(count)]
    return quantized(node.emit(relax.op.concat(parts, axis), "real"), output_affine(node, 0, 1, node.value(2).kind))


@_ms("QLinearSigmoid", 4, 5)
@_ms("QLinearLeakyRelu", 4, 5)
@_ms("QLinearSoftmax", 5, 5)
def qlinear_unary(node: Node) -> Result:
    """A function of one quantized tensor."""
    x = real_input(node, 0, "x")
    if node.op == "QLinearSigmoid":
        y = relax.op.sigmoid(x)
    elif node.op == "QLinearLeakyRelu":
        y = relax.op.nn.leakyrelu(x, node.attr("alpha", 0.01))
    else:
        opset = node.attr("opset", 13)
        y = softmax_over(node, x, node.attr("axis", -1 if opset >= 13 else 1), opset < 13)
    return quantized(node.emit(y, "real"), output_affine(node, 3, 4, node.value(0).kind))


@_ms("QLinearWhere", 9, 9)
def qlinear_where(node: Node) -> Result:
    """Elements of one quantized tensor or the other, at a scale of their own."""
    node.need(
        node.value(0).kind == "bool", "has a condition of the wrong type", expected="bool", found=node.value(0).kind
    )
    check_broadcast(node, node.value(0), node.value(1), node.value(4))
    chosen = relax.op.where(node.expr(0), real_input(node, 1, "x"), real_input(node, 4, "y"))
    return quantized(node.emit(chosen, "real"), output_affine(node, 7, 8, node.value(1).kind))


@_ms("QGemm", 6, 9)
def qgemm(node: Node) -> Result:
    """alpha A B + C: C is int32 at the scale alpha a_scale b_scale; without y_scale the result is float."""
    for i in (0, 3):
        node.need(len(node.shape(i)) == 2, "multiplies matrices", expected="rank 2", found=list(node.shape(i)))
    both = node.given(7) == node.given(8)
    node.need(both, "has only one of y_scale and y_zero_point", expected="both, or none for a float result")
    alpha = node.attr("alpha", 1.0)
    node.need(alpha > 0, "has an alpha that is not positive", expected="above 0", found=alpha)
    a_how = affine(node, 1, 2, check_kind(node, 0), ())
    column_axis = 0 if node.flag("transB", 0) else 1
    b_how = affine(node, 4, 5, check_kind(node, 3), node.shape(3), column_axis)
    a = Tensor(node.emit(dequantized(node.value(0), a_how), "a"), "float32")
    b = Tensor(node.emit(dequantized(node.value(3), b_how), "b"), "float32")
    left, right = transposed(node, a, "transA", "a_t"), transposed(node, b, "transB", "b_t")
    bias = int32_bias(node, 6, exact_product(a_how.scale, b_how.scale) * alpha)
    y = gemm_of(node, left, right, bias, alpha, 1.0)
    if not node.given(7):
        return y
    return quantized(node.emit(y, "real"), output_affine(node, 7, 8, node.value(0).kind))


@_ms("MatMulIntegerToFloat", 4, 7)
def matmul_integer_to_float(node: Node) -> Result:
    """Product of integers as real numbers, plus a float bias: (A, B, a_scale, b_scale, a_zero?, b_zero?, bias?)."""
    check_product(node, node.shape(0), node.shape(1))
    a = node.emit(dequantized(node.value(0), affine(node, 2, 4, check_kind(node, 0), ())), "a")
    b = node.emit(
        dequantized(node.value(1), affine(node, 3, 5, check_kind(node, 1), node.shape(1), len(node.shape(1)) - 1)), "b"
    )
    y = relax.op.matmul(a, b)
    return relax.op.add(node.emit(y, "acc"), node.expr(6)) if node.given(6) else y
